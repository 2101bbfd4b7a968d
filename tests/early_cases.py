"""Commands that are wrong by themselves, and a stub for what starts processes; no torch here.

`tests/test_early.py` runs this file in one process, without torch: a command that gets as far as a
process ends with `STARTED`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from hybrid import cli
from hybrid.launch import local, warm

JOB = """
model = {name = "mlp", options = {sizes = [7, 6, 5, 3]}}
data = {name = "random", options = {features = 7, classes = 3, samples = 90}}
optimizer = {name = "sgd", lr = 0.1}
train = {global_batch = 15, micro_batches = 2, steps = 3}
"""
TEXT = """
model = {name = "gpt", options = {num_layers = 2, width = 8, num_heads = 2, context = 32}}
data = {name = "text", options = {context = 32}}
optimizer = {name = "sgd", lr = 0.1}
train = {global_batch = 15, micro_batches = 2, steps = 3}
"""
DDP, MANY = "train job.toml --strategy ddp", "9" * 30
# command: words of its one line, which is the refusal; `STARTED` and words: a warning before.
CASES: dict[str, list[str]] = {
    f"{DDP} --nproc {MANY}": ["--nproc", MANY[:20], "valid: 1 to 128"],
    f"{DDP} --nproc 1000000000000": ["--nproc", "1000000000000", "valid: 1 to 128"],
    f"{DDP} --nproc 129": ["--nproc", "129 processes", "2 cores", "valid: 1 to 128"],
    f"{DDP} --nproc {'9' * 5000}": ["--nproc", "9999", "valid: 1 to 128"],
    f"{DDP} --nproc 0": ["--nproc", "'0'", "valid: 1 or more"],
    f"{DDP} --nproc -2": ["--nproc", "-2"],
    f"{DDP} --nproc two": ["--nproc", "'two'", "valid: 1 or more"],
    f"{DDP} --nproc 2.5": ["--nproc", "'2.5'"],
    f"{DDP} --nproc 23": ["train.global_batch = 15", "8 of 23 data-parallel ranks", "valid: 15"],
    f"compare job.toml --nproc {MANY}": ["--nproc", "valid: 1 to 128"],
    "compare job.toml --nproc 100 --strategies single,zero2": ["85 of 100", "zero2"],
    "check job.toml --nproc 1000": ["--nproc", "valid: 1 to 128"],
    "check job.toml --set launch.device=cuda": ["STARTED"],  # no rank, so it needs no GPU
    f"{DDP} --set parallel.dp=1000000000000": ["parallel.dp = 1000000000000", "valid: 1 to 128"],
    "train job.toml --strategy fsdp --set parallel.replicate=1000000000": ["parallel.replicate"],
    'compare job.toml --set variant.big={strategy="2d",pp=2,dp=1000000}': ["variant.big", "pp"],
    "train job.toml --strategy single --set strategy.single.emulate_ranks=10000000 --nproc 1": [
        "train.global_batch = 15",
        "ranks",
    ],
    "train job.toml --strategy 2d --set parallel.pp=3 --nproc 4": ["parallel.pp", "4 processes"],
    "train job.toml --strategy fsdp --set parallel.shard=3 --nproc 4": ["shard", "4 processes"],
    "train job.toml --strategy pipeline --nproc 4": ["3 layers, 4 stages", "--nproc 3"],
    "train job.toml --strategy 2d --nproc 8 --set parallel.pp=4": ["3 layers", "parallel.pp = 3"],
    "train text.toml --strategy pipeline --nproc 5": ["4 layers, 5 stages"],
    "train hf.toml --strategy pipeline --nproc 6": ["5 layers, 6 stages"],
    "train job.toml --strategy pipeline --nproc 2 --set strategy.pipeline.partition=[9,9]": [
        "partition [9, 9]",
        "3 layers",
    ],
    f"{DDP} --set train.micro_batches=9223372036854775807": ["train.micro_batches", "65536"],
    f"{DDP} --set train.micro_batches=16": ["train.micro_batches = 16", "valid: 1 to 15"],
    f"{DDP} --set strategy.ddp.micro_batches=99": ["strategy.ddp.micro_batches = 99", "1 to 15"],
    f"{DDP} --set data.workers=1000000": ["data.workers = 1000000", "2 cores", "valid: 0 to 64"],
    f"{DDP} --set strategy.ddp.bucket_cap_mb=9000000000": ["bucket_cap_mb", "1048576"],
    f"{DDP} --set model.options.sizes=[8,3]": ["sizes[0] = 8", "gives 7 numbers", "valid: 7"],
    f"{DDP} --set data.options.classes=4": ["sizes[3] = 3", "4 classes", "valid: 4 or more"],
    f"{DDP} --set data.name=text --set data.options={{}}": ["model.name = 'mlp'", "token ids"],
    f"{DDP} --set data.name=mnist --set data.options={{}}": ["sizes[0] = 7", "valid: 784"],
    "train text.toml --strategy ddp --set data.name=random --set data.options={}": ["token ids"],
    "train text.toml --strategy ddp --set data.options.context=33": [
        "model.options.context = 32",
        "valid: 33 or more",
    ],
    "train text.toml --strategy ddp --set model.options.vocab_size=256": ["256", "257 or more"],
    f"{DDP} --nproc 2 --set parallel.pp=2": ["STARTED", "parallel.pp = 2 has no effect under ddp"],
    "train job.toml --strategy fsdp --nproc 2 --set parallel.dp=4": ["STARTED", "parallel.dp = 4"],
    "compare job.toml --strategies ddp,pipeline --nproc 2 --set parallel.replicate=4": [
        "STARTED",
        "parallel.replicate = 4",
        "fsdp has it",
    ],
    f"{DDP} --nproc 2 --set parallel.dp=2": ["STARTED"],
    "compare job.toml --nproc 4 --set parallel.pp=2": ["STARTED"],
    f"{DDP} --nproc 15": ["STARTED"],
}


class Started(BaseException):
    """Says that a command would have started a process."""


def start(*_: object, **__: object) -> None:
    raise Started


def run(words: list[str]) -> tuple[str, str, str]:
    """Run the command line: how it ends, stdout, stderr."""
    sys.argv = ["hybrid", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            end = "0"
        except SystemExit as left:
            end = str(left.code)
        except Started:
            end = "STARTED"
    return end, out.getvalue(), err.getvalue()


def main() -> None:
    """Run all commands in this folder, and print how each ended as JSON."""
    local._start = start  # type: ignore[assignment]
    warm.WarmProcess.__init__ = start  # type: ignore[method-assign,assignment]
    Path("job.toml").write_text(JOB)
    Path("text.toml").write_text(TEXT)
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text(json.dumps({"num_hidden_layers": 3, "vocab_size": 300}))
    Path("hf.toml").write_text(
        TEXT.replace('"gpt", options', '"hf:tiny", options_').replace(
            ", options_ = {num_layers = 2, width = 8, num_heads = 2, context = 32}", ""
        )
    )
    found = {command: run(command.split()) for command in CASES}
    json.dump([found, sorted(sys.modules.keys() & {"torch", "numpy"})], sys.stdout)


if __name__ == "__main__":
    main()
