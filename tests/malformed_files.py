"""What `test_malformed.py` hands to the command line: each a file that no one should write.

A table's rows: what a file holds, and words that the line about it must have.
"""

from __future__ import annotations

JOB = """
[model]
name = "linear"
options = { in_features = 32, out_features = 10 }
[data]
name = "random"
[optimizer]
name = "sgd"
lr = 0.1
[train]
global_batch = 24
steps = 2
"""


def job(old: str, new: str) -> bytes:
    """The job with one piece replaced."""
    assert JOB.count(old) == 1
    return JOB.replace(old, new).encode()


def nested(levels: int) -> str:
    """That many JSON objects, one in the other."""
    return '{"a":' * levels + "1" + "}" * levels


# name of the file: (what it holds, words of the line)
JOBS_TOML: dict[str, tuple[bytes, list[str]]] = {
    "empty.toml": (b"", ["model: missing"]),
    "blank.toml": (b"\n\n  \n# nothing\n", ["model: missing"]),
    "binary.toml": (bytes(range(256)), ["UTF-8", "byte 128"]),
    "random.toml": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["UTF-8", "byte 0"]),
    "nul.toml": (JOB.encode() + b"\0", ["not a TOML file", "line 13"]),
    "utf16.toml": (JOB.encode("utf-16"), ["UTF-8", "byte 0 is 0xff"]),
    "latin1.toml": (job('"random"', '"caf\xe9"').decode().encode("latin-1"), ["UTF-8", "0xe9"]),
    "surrogate.toml": (b'model = "\xed\xa0\x80"', ["UTF-8", "byte 9"]),
    "large.toml": (b"# " + b"x" * 2**16, ["more than 64 KiB"]),
    "dots.toml": (
        b"a." * 30000 + b"b = 1",
        ["not a TOML file", "more than 100 parts in the key a.a"],
    ),
    "quoted_dots.toml": (b'["a".' + b"'a' . " * 9000 + b"b]", ["more than 100 parts"]),
    "brackets.toml": (b"a = " + b"[" * 30000, ["not a TOML file", "nested too deeply"]),
    "tables.toml": (b"a = " + b"{a = " * 10000, ["not a TOML file", "nested too deeply"]),
    "deep_options.toml": (
        job("options = {", "options." + "a." * 90 + "b = { a = " + "[" * 20 + "]" * 20 + ", "),
        ["model.options", "nested more than 100 levels"],
    ),
    "many_keys.toml": (
        "".join(f"k{i} = 1\n" for i in range(5000)).encode(),
        ["k0: unknown key"],
    ),
    "long_key.toml": (b"k" * 60000 + b" = 1", ["kkk...: unknown key"]),
    "long_value.toml": (job('"sgd"', f'"{"s" * 60000}"'), ["optimizer.name = 'sss", "sss..."]),
    "digits.toml": (job("24", "9" * 5000), ["not a TOML file", "4300 digits"]),
    "hex.toml": (job("24", "0x" + "f" * 9000), ["train.global_batch", "too large to show"]),
    "large_int.toml": (job("24", "9" * 30), ["train.global_batch = 999", "less than 9223372"]),
    "large_float.toml": (job("0.1", "9" * 400), ["optimizer.lr", "valid number"]),
    "nan.toml": (job("0.1", "nan"), ["optimizer.lr = nan", "finite"]),
    "infinite.toml": (job("0.1", "inf"), ["optimizer.lr = inf", "finite"]),
    "negative.toml": (job("24", "-24"), ["train.global_batch = -24", "1"]),
    "text_for_number.toml": (job("24", '"24"'), ["train.global_batch = '24'", "integer"]),
    "number_for_text.toml": (job('"sgd"', "3"), ["optimizer.name = 3", "string"]),
    "bool_for_number.toml": (job("24", "true"), ["train.global_batch = True", "integer"]),
    "list_for_section.toml": (b"train = []\n", ["train = []"]),
    "tables_for_section.toml": (b"[[train]]\nsteps = 1\n", ["train = [{"]),
    "date.toml": (
        job("in_features = 32", "in_features = 2020-01-01"),
        ["model.options", "date is not JSON"],
    ),
    "nan_option.toml": (job("in_features = 32", "in_features = nan"), ["model.options", "finite"]),
    "typo_section.toml": (job("[optimizer]", "[optimiser]"), ["did you mean 'optimizer'?"]),
    "typo_key.toml": (job("steps", "stpes"), ["train.stpes", "did you mean 'steps'?"]),
    "typo_strategy.toml": (
        JOB.encode() + b"[strategy.zero4]\n",
        ["strategy.zero4: unknown key", "did you mean 'zero3'?"],
    ),
    "look_alike.toml": (job("steps", '"st\u0435ps"'), ["train.st\u0435ps: unknown key", "'steps'"]),
    "control.toml": (b'"a\\u001b[31m\\nb" = 1', ["a\\x1b[31m\\nb: unknown key"]),
    "both_lengths.toml": (JOB.encode() + b"epochs = 1\n", ["epochs = 1, steps = 2", "one of"]),
    "twice.toml": (JOB.encode() + b"steps = 3\n", ["not a TOML file", "line 13"]),
    "section_twice.toml": (JOB.encode() + b"[data]\n", ["not a TOML file", "twice"]),
    "python.toml": (b"import os\n", ["not a TOML file", "line 1"]),
    "tag.yaml": (b"model: !!python/object/apply:os.system [ls]\n", ["not a TOML file", "line 1"]),
    "anchors.yaml": (b"a: &a [1]\nb: [*a, *a]\n", ["not a TOML file"]),
    "empty.json": (b"", ["not a JSON file"]),
    "twice.json": (b'{"train": {"steps": 1, "steps": 2}}', ["'steps' stands twice"]),
    "nan.json": (b'{"train": {"steps": NaN}}', ["not a JSON file", "NaN"]),
    "deep.json": (b"[" * 10**6, ["not a JSON file", "nested too deeply"]),
    "null.json": (b"null", ["NoneType", "sections of keys"]),
    "surrogate.json": (
        b'{"optimizer": {"name": "\\ud800"}}',
        ["optimizer.name = '\\ud800'", "sgd"],
    ),
}
# Made by `folder`: what is there but is no file.
ODD_JOBS = {
    "loop.toml": ["Too many levels of symbolic links"],
    "self.toml": ["Too many levels of symbolic links"],
    "dangling.toml": ["No such file"],
    "folder.toml": ["hybrid: folder.toml: cannot be read: is a directory, not a file"],
    "pipe.toml": ["a pipe or a device"],
    "sparse.toml": ["hybrid: sparse.toml: cannot be read: holds more than 64 KiB"],
    "sparse.json": ["more than 16384 KiB"],
    "/dev/zero": ["a pipe or a device"],
    "/dev/null": ["a pipe or a device"],
    "linear.toml/more.toml": ["Not a directory"],
    "n" * 300: ["too long"],
    "red\x1b[31m\n.toml": ["\\x1b[31m", "No such file"],
    "": ["a directory"],
}
ZERO2 = '"zero_optimization": {"stage": 2'
DS_CONFIGS: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["not a JSON file"]),
    "no keys": ("{}", ["zero_optimization.stage = 0", "needs 2"]),
    "a list": ("[]", ["list, not an object"]),
    "a comment": ('{ // ours\n "zero_optimization": {"stage": 2}}', ["not a JSON file", "line 1"]),
    "a comma too many": ("{" + ZERO2 + "},}", ["not a JSON file"]),
    "YAML": ("zero_optimization: !!python/name:os.system\n", ["not a JSON file", "line 1"]),
    "a key twice": ("{" + ZERO2 + '}, "zero_optimization": {"stage": 3}}', ["stands twice"]),
    "an inner key twice": ("{" + ZERO2 + ', "stage": 2}}', ["'stage' stands twice"]),
    "NaN": ("{" + ZERO2 + '}, "gradient_predivide_factor": NaN}', ["NaN is no number"]),
    "infinite": ("{" + ZERO2 + '}, "gradient_predivide_factor": 1e999}', ["1e999 is no number"]),
    "deep": (nested(100000), ["nested too deeply"]),
    "nested garbage": ("{" + ZERO2 + ', "offload_param": ' + nested(300) + "}}", [".a: unknown"]),
    "garbage for a number": (
        "{" + ZERO2 + ', "reduce_bucket_size": ' + nested(300) + "}}",
        ["zero_optimization.reduce_bucket_size = {'a'", "...", "integer > 0"],
    ),
    "digits": ("{" + ZERO2 + ', "sub_group_size": ' + "9" * 5000 + "}}", ["4300 digits"]),
    "unknown key": (
        "{" + ZERO2 + '}, "zero_optimisation": {}}',
        ["zero_optimisation: unknown key; did you mean 'zero_optimization'?", "DeepSpeed 0."],
    ),
    "unknown key of a section": (
        "{" + ZERO2 + ', "reduce_buket_size": 1}}',
        ["zero_optimization.reduce_buket_size", "did you mean 'reduce_bucket_size'?"],
    ),
    "unknown key two levels down": (
        "{" + ZERO2 + ', "offload_optimizer": {"devise": "cpu"}}}',
        ["zero_optimization.offload_optimizer.devise", "did you mean 'device'?"],
    ),
    "unknown key of another section": (
        "{" + ZERO2 + '}, "activation_checkpointing": {"cpu_checkpoint": true}}',
        ["activation_checkpointing.cpu_checkpoint", "did you mean 'cpu_checkpointing'?"],
    ),
    "unknown key of the comms logger": (
        "{" + ZERO2 + '}, "comms_logger": {"on": true}}',
        ["comms_logger.on: unknown key; valid: enabled, prof_all"],
    ),
    "long key": ("{" + ZERO2 + '}, "' + "k" * 10**6 + '": 1}', ["kkk...: unknown key"]),
    "control characters": ("{" + ZERO2 + '}, "\\u001b[2J\\n": 1}', ["\\x1b[2J\\n: unknown key"]),
    "removed from DeepSpeed": ("{" + ZERO2 + '}, "elasticity": {}}', ["elasticity: unknown key"]),
    "text for a number": (
        "{" + ZERO2 + ', "reduce_bucket_size": "5e7"}}',
        ["zero_optimization.reduce_bucket_size = '5e7'", "integer > 0"],
    ),
    "auto": (
        "{" + ZERO2 + ', "reduce_bucket_size": "auto"}}',
        ["zero_optimization.reduce_bucket_size = 'auto'", "integer > 0"],
    ),
    "number for a truth": ("{" + ZERO2 + ', "overlap_comm": 1}}', ["overlap_comm = 1", "boolean"]),
    "truth for a number": (
        '{"zero_optimization": {"stage": true}}',
        ["stage = True", "0, 1, 2, 3"],
    ),
    "a half": ("{" + ZERO2 + ', "reduce_bucket_size": 1.5}}', ["bucket_size = 1.5", "integer"]),
    "too small": ("{" + ZERO2 + ', "reduce_bucket_size": 0}}', ["bucket_size = 0", "> 0"]),
    "no such choice": (
        "{" + ZERO2 + ', "offload_optimizer": {"device": "disk"}}}',
        ["offload_optimizer.device = 'disk'", "'none', 'cpu', 'nvme'"],
    ),
    "value for a section": ('{"zero_optimization": 2}', ["zero_optimization = 2", "object"]),
    "null for a section": ('{"zero_optimization": null}', ["zero_optimization = None", "object"]),
    "another stage": ('{"zero_optimization": {"stage": 3}}', ["stage = 3", "needs 2"]),
    "what the job says": ("{" + ZERO2 + '}, "fp16": {}}', ["fp16", "train.precision"]),
    "what the toolkit does": (
        "{" + ZERO2 + '}, "tensor_parallel": {"autotp_size": 2}}',
        ["tensor_parallel", "no strategy here splits tensors"],
    ),
    "large": ('{"a": "' + "x" * 2**24 + '"}', ["more than 16384 KiB"]),
}
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
ACCELERATE = {**RANK, "ACCELERATE_MIXED_PRECISION": "no"}
LAUNCHERS: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "a rank that is no number": ("zero2", {**RANK, "RANK": "one"}, ["RANK = 'one'"]),
    "a rank outside the world": (
        "zero2",
        {**RANK, "RANK": "2"},
        ["RANK = '2'", "WORLD_SIZE = '2'"],
    ),
    "a negative rank": ("zero2", {**RANK, "RANK": "-1"}, ["RANK = '-1'"]),
    "an empty world": ("zero2", {**RANK, "WORLD_SIZE": "0"}, ["WORLD_SIZE = '0'"]),
    "an empty size": ("zero2", {**RANK, "WORLD_SIZE": ""}, ["WORLD_SIZE = ''"]),
    "half of it": ("zero2", {"RANK": "0"}, ["WORLD_SIZE is not set"]),
    "other digits": ("zero2", {**RANK, "WORLD_SIZE": "\u0662"}, ["WORLD_SIZE"]),
    "FSDP for ZeRO": (
        "zero2",
        {**ACCELERATE, "ACCELERATE_USE_FSDP": "true"},
        ["'zero2'", "fsdp = 'true'"],
    ),
    "DeepSpeed for DDP": (
        "ddp",
        {**ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true"},
        ["'ddp'", "deepspeed = 'true'"],
    ),
    "a stage that is no number": (
        "zero2",
        {**ACCELERATE, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "two"},
        ["zero_stage = 'two'", "2"],
    ),
    "another precision": (
        "ddp",
        {**RANK, "ACCELERATE_MIXED_PRECISION": "fp8"},
        ["mixed_precision = 'fp8'", "no"],
    ),
    "FSDP1": ("fsdp", {**ACCELERATE, "FSDP_VERSION": "1"}, ["fsdp_version = '1'", "2"]),
    "a file of DeepSpeed's": (
        "zero2",
        {**ACCELERATE, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"},
        ["deepspeed_config_file", "ds_config"],
    ),
}
