"""What `test_malformed.py` hands to `hybrid doctor`: files for launchers that no one should write.

A table's rows: what a file holds, and words that the line about it must have.
"""

from __future__ import annotations

FSDP = """
distributed_type: FSDP
num_processes: 4
mixed_precision: "no"
fsdp_config:
  fsdp_version: 2
"""
PARALLEL = "\nparallelism_config: {parallelism_config_dp_shard_size: 8}\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)


def config(old: str, new: str) -> bytes:
    """The configuration with one piece replaced."""
    assert FSDP.count(old) == 1
    return FSDP.replace(old, new).encode()


# name of the file: (what it holds, words of the line)
ACCELERATE_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty.yaml": (b"", ["holds nothing, not a mapping"]),
    "blank.yml": (b"# nothing\n---\n", ["holds nothing"]),
    "list.yaml": (b"- distributed_type: FSDP\n", ["holds a list"]),
    "word.yaml": (b"FSDP", ["holds a str"]),
    "binary.yaml": (bytes(range(256)), ["UTF-8", "byte 128"]),
    "utf16.yaml": (FSDP.encode("utf-16"), ["UTF-8", "byte 0 is 0xff"]),
    "nul.yaml": (FSDP.encode() + b"\0", ["line 7", "0x00"]),
    "control.yaml": (b"a: 1\n\x1b[31m: 1\n", ["line 2: the character 0x1b"]),
    "large.yaml": (b"# " + b"x" * 2**16, ["more than 64 KiB"]),
    "many_keys.yaml": (
        "".join(f"k{i}: 1\n" for i in range(6000)).encode(),
        ["line 1000", "2000 values"],
    ),
    "brackets.yaml": (b"[" * 60000, ["line 1", "8 levels"]),
    "dashes.yaml": (b"- " * 30000, ["line 1", "8 levels"]),
    "braces.yaml": (b"fsdp_config: " + b"{a: " * 15000, ["line 1", "8 levels"]),
    "bomb.yaml": (BOMB.encode(), ["line 1: an anchor or an alias"]),
    "itself.yaml": (b"&a [*a]", ["line 1: an anchor or an alias"]),
    "merged.yaml": (FSDP.encode() + b"<<: {debug: true}\n", ["line 7: a key is no text"]),
    "python.yaml": (
        b"distributed_type: !!python/object/apply:os.system [ls]\n",
        ["line 1: a tag", "python/object/apply:os.system"],
    ),
    "tag.yaml": (config("4", "!!int 4"), ["line 3: a tag", "yaml.org,2002:int"]),
    "own_tag.yaml": (config("4", "!env N"), ["line 3: a tag", "!env"]),
    "set.yaml": (b"!!set {FSDP}", ["line 1: a tag"]),
    "handle.yaml": (config("4", "!a!b 4"), ["line 3", "tag handle '!a!'"]),
    "twice.yaml": (FSDP.encode() + b"num_processes: 2\n", ["line 7: 'num_processes' stands twice"]),
    "inner_twice.yaml": (FSDP.encode() + b"  fsdp_version: 1\n", ["line 7", "stands twice"]),
    "spelt_twice.yaml": (
        FSDP.encode() + b"  version: 1\n",
        ["fsdp_config.'fsdp_version' stands twice, once as 'version'"],
    ),
    "documents.yaml": (FSDP.encode() + b"---\n" + FSDP.encode(), ["line 7", "another document"]),
    "tab.yaml": (b"fsdp_config:\n\tfsdp_version: 2\n", ["line 2", "cannot start any token"]),
    "unclosed.yaml": (
        config('"no"', '"no'),
        ["line 7: found unexpected end", "quoted scalar in line 4"],
    ),
    "toml.yaml": (b'[fsdp_config]\nfsdp_version = "2"\n', ["line 2", "plain YAML file"]),
    "number_key.yaml": (FSDP.encode() + b"no: 1\n", ["line 7: a key is no text"]),
    "list_key.yaml": (b"? [a]\n: 1\n", ["line 1: a key is no text"]),
    "typo.yaml": (
        config("num_processes", "num_proceses"),
        ["num_proceses: unknown key; did you mean 'num_processes'?", "accelerate 1."],
    ),
    "inner_typo.yaml": (
        config("fsdp_version", "fsdp_verson"),
        ["fsdp_config.fsdp_verson: unknown key; did you mean 'fsdp_version'?"],
    ),
    "bare_typo.yaml": (
        config("fsdp_version", "verson"),
        ["fsdp_config.fsdp_verson", "did you mean 'fsdp_version'?"],
    ),
    "other_section.yaml": (
        FSDP.encode() + b"deepspeed_config: {num_processes: 8}\n",
        ["deepspeed_config.num_processes: unknown key", "zero_stage"],
    ),
    "look_alike.yaml": (
        config("num_processes", "num_pr\u043ecesses"),
        ["num_pr\u043ecesses: unknown key", "'num_processes'"],
    ),
    "long_key.yaml": (FSDP.encode() + b"? " + b"k" * 60000, ["kkk...: unknown key"]),
    "job.yaml": (b"train:\n  steps: 2\n", ["train: unknown key; "]),
    "no_type.yaml": (config("distributed_type: FSDP", ""), ["distributed_type: missing", "FSDP"]),
    "unknown_type.yaml": (config("FSDP", "DDP"), ["distributed_type = 'DDP'", "'MULTI_GPU'"]),
    "small_type.yaml": (config("FSDP", "fsdp"), ["distributed_type = 'fsdp'", "'FSDP'"]),
    "bare_no.yaml": (config("FSDP", "NO"), ["distributed_type = False", "put it in quotes"]),
    "sagemaker.yaml": (
        FSDP.encode() + b"compute_environment: AMAZON_SAGEMAKER\n",
        ["compute_environment = 'AMAZON_SAGEMAKER'", "'LOCAL_MACHINE'"],
    ),
    "precision.yaml": (config('"no"', "bf32"), ["mixed_precision = 'bf32'", "'bf16'"]),
    "bare_precision.yaml": (config('"no"', "no"), ["mixed_precision = False", "put it in quotes"]),
    "version.yaml": (config("n: 2", "n: 3"), ["fsdp_config.fsdp_version = 3", "<= 2"]),
    "stage.yaml": (
        FSDP.encode() + b"deepspeed_config: {zero_stage: 4}\n",
        ["deepspeed_config.zero_stage = 4", "<= 3"],
    ),
    "policy.yaml": (
        FSDP.encode() + b"  fsdp_auto_wrap_policy: TRANSFORMER\n",
        ["fsdp_auto_wrap_policy = 'TRANSFORMER'", "'TRANSFORMER_BASED_WRAP'"],
    ),
    "reshard.yaml": (
        FSDP.encode() + b"  fsdp_reshard_after_forward: FULL_SHARD\n",
        ["fsdp_reshard_after_forward = 'FULL_SHARD'", "true or false"],
    ),
    "not_synced.yaml": (
        FSDP.encode() + b"  fsdp_sync_module_states: false\n",
        ["fsdp_sync_module_states = False", "fsdp_cpu_ram_efficient_loading: false"],
    ),
    "quoted_false.yaml": (
        FSDP.encode() + b"  sync_module_states: false\n  cpu_ram_efficient_loading: 'false'\n",
        ["fsdp_sync_module_states = False", "in quotes, it is true"],
    ),
    "prefetch.yaml": (
        FSDP.encode() + b"  fsdp_backward_prefetch: '3'\n",
        ["fsdp_backward_prefetch = '3'", "<= 2", "'NO_PREFETCH'"],
    ),
    "clipping.yaml": (
        FSDP.encode() + b"deepspeed_config: {gradient_clipping: '-1'}\n",
        ["gradient_clipping = '-1'", ">= 0", "'auto'"],
    ),
    "minus_two.yaml": (config("4", "-2"), ["num_processes = -2", ">= 1 or -1"]),
    "text_for_number.yaml": (config("4", "four"), ["num_processes = 'four'", "whole number >= 1"]),
    "half.yaml": (config("4", "4.5"), ["num_processes = 4.5", "whole number"]),
    "truth_for_number.yaml": (config("4", "yes"), ["num_processes = True", "whole number"]),
    "none.yaml": (config("4", "0"), ["num_processes = 0", ">= 1"]),
    "null.yaml": (config("4", "null"), ["num_processes = None", "whole number"]),
    "digits.yaml": (config("4", "4" * 5000), ["plain YAML file", "4300 digits"]),
    "no_date.yaml": (config("4", "2020-13-45"), ["plain YAML file", "month"]),
    "date.yaml": (config("4", "2020-01-01"), ["num_processes = datetime.date(2020, 1, 1)"]),
    "number_for_section.yaml": (
        FSDP.encode() + b"dynamo_config: 3\n",
        ["dynamo_config = 3: valid: object"],
    ),
    "number_for_text.yaml": (FSDP.encode() + b"gpu_ids: 0\n", ["gpu_ids = 0", "string"]),
    "rank.yaml": (FSDP.encode() + b"machine_rank: 1\n", ["machine_rank = 1", "num_machines = 1"]),
    "uneven.yaml": (FSDP.encode() + b"num_machines: 3\n", ["num_processes = 4", "multiple of"]),
    "product.yaml": (FSDP.encode() + PARALLEL.encode(), ["product is 8", "num_processes 4"]),
    "one_gpu.yaml": (
        b"distributed_type: MULTI_GPU\nnum_processes: 2\ngpu_ids: '0'\n",
        ["gpu_ids = '0'", "wants two"],
    ),
    "old_and_new.yaml": (
        FSDP.encode() + b"dynamo_backend: inductor\ndynamo_config: {}\n",
        ["dynamo_backend = 'inductor'", "one of the two"],
    ),
    "typo.json": (
        b'{"distributed_type": "FSDP", "num_process": 4}',
        ["num_process: unknown key; did you mean 'num_processes'?"],
    ),
    "twice.json": (
        b'{"distributed_type": "FSDP", "distributed_type": "NO"}',
        ["'distributed_type' stands twice"],
    ),
}
HOSTFILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["names no host", "HOST slots=N"]),
    "comments": (b"# node1 slots=2\n\n", ["names no host"]),
    "no_slots": (b"node1\n", ["line 1 = 'node1': valid: HOST slots=N"]),
    "mpich": (b"node1:2\n", ["line 1 = 'node1:2'"]),
    "zero": (b"node1 slots=2\nnode2 slots=0\n", ["line 2: slots = 0 of node2: valid: 1 to"]),
    "negative": (b"node1 slots=-1\n", ["line 1 = 'node1 slots=-1'"]),
    "word": (b"node1 slots=x\n", ["line 1 = 'node1 slots=x'"]),
    "unit": (b"node1 slots=2x\n", ["line 1 = 'node1 slots=2x'"]),
    "more": (b"node1 slots=2 max_slots=4\n", ["line 1"]),
    "spaces": (b"node1 slots = 2\n", ["line 1 = 'node1 slots = 2'"]),
    "digits": ("node1 slots=\u0662\n".encode(), ["line 1 = 'node1 slots=\u0662'"]),
    "many": (b"node1 slots=999999999\n", ["slots = 999999999", "4096"]),
    "very_many": (b"node1 slots=" + b"9" * 5000, ["line 1 = 'node1 slots=999", "..."]),
    "twice": (b"node1 slots=2\nnode2 slots=2\nnode1 slots=2\n", ["line 3: 'node1' stands twice"]),
    "option": (b"-oProxyCommand=ls slots=2\n", ["line 1 = '-oProxyCommand=ls slots=2'"]),
    "letters": ("n\u0153ud slots=2\n".encode(), ["line 1 = 'n\u0153ud"]),
    "nul": (b"node1\0 slots=2\n", ["line 1 = 'node1\\x00"]),
    "binary": (bytes(range(256)), ["UTF-8", "byte 128"]),
    "long_line": (b"n" * 60000, ["line 1 = 'nnn", "..."]),
    "large": (b"node1 slots=2\n" * 5000, ["more than 64 KiB"]),
    "job.toml": (b"[model]\nname = 'mlp'\n", ["line 1 = '[model]'", "read as a hostfile"]),
}
DEEPSPEED_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty.json": (b"", ["not a JSON file"]),
    "list.json": (b"[]", ["list, not an object"]),
    "deep.json": (b"[" * 10**6, ["nested too deeply"]),
    "stage_twice.json": (
        b'{"zero_optimization": {"stage": 1, "stage": 2}}',
        ["'stage' stands twice"],
    ),
    "ds_typo.json": (
        b'{"zero_optimisation": {}}',
        ["zero_optimisation: unknown key; did you mean 'zero_optimization'?", "DeepSpeed 0."],
    ),
    "ds_type.json": (b'{"zero_optimization": {"stage": "2"}}', ["zero_optimization.stage = '2'"]),
    "of_the_job.json": (b'{"train_batch_size": 8}', ["train_batch_size: set train.global_batch"]),
    "ds_large.json": (b'{"a": "' + b"x" * 2**24 + b'"}', ["more than 16384 KiB"]),
}
LAUNCH_FILES = ACCELERATE_FILES | HOSTFILES | DEEPSPEED_FILES
# Made by `folder`: what is there but is no file.
ODD_LAUNCH_FILES = {
    "loop.yaml": ["Too many levels of symbolic links"],
    "loop": ["Too many levels of symbolic links"],
    "gone.yaml": ["No such file"],
    "folder.yaml": ["is a directory"],
    "pipe.json": ["a pipe or a device"],
    "sparse.yaml": ["more than 64 KiB"],
    "sparse": ["more than 64 KiB"],
}
