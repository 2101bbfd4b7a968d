"""What one GPU shows: strategies on one process of it against `single`, and the speed of a GPT.

    python -m benchmarks.gpu --out out/gpu            # at most six minutes on one GPU
    python -m benchmarks.gpu --out out/gpu --small    # the same path at a small size, on a CPU too
    python -m benchmarks.gpu --out out/gpu --part speed

Run from the top folder. It writes `gpu.json` into the folder and prints what it holds. First come
tokens per second of the 124M GPT in bf16, compiled (not at the small size), under `single`, `ddp`
and `fsdp`, beside a plain torch loop in the same process, which runs before and after them. Model
FLOPs per token are 6 N + 12 L H Q T (Chowdhery et al. 2022, PaLM, appendix B). Then comes the GPT
of `launch/jobs/gpt.toml` in fp32, bf16 and fp16 under each strategy that runs on one process. A
precision that could not begin within four minutes is not run, and `gpu.json` has null for it;
`--part agreement` runs all of them.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hybrid
from hybrid import records
from hybrid.job.file import to_dict
from hybrid.records import Comparison

from .machine import summarise_machine

STRATEGIES = ["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
PRECISIONS = ("fp32", "bf16", "fp16")
FAST = ("single", "ddp", "fsdp")
PEAK_FLOPS = 989e12  # an H100 or H200 in dense bf16
BEGIN_WITHIN_S = 240  # what begins later would not end within six minutes
WARMUP = 5
SMALL: dict[str, Any] = {
    "model.options": {"num_layers": 5, "width": 48, "num_heads": 3, "context": 16},
    "data.options": {"context": 16, "max_bytes": 200_000},
}


def agreement(out: Path, small: bool, begin_by: float) -> dict[str, list[dict[str, Any]] | None]:
    """Return a row for each strategy in each precision, None for one that was not run.

    begin_by: the last moment, in seconds of `time.monotonic`, at which one may begin."""
    found: dict[str, list[dict[str, Any]] | None] = dict.fromkeys(PRECISIONS)
    for precision in PRECISIONS:
        if time.monotonic() > begin_by:
            break
        changes = {"train.precision": precision} | ({**SMALL, "train.steps": 5} if small else {})
        job = hybrid.load_job("launch/jobs/gpt.toml", changes)
        found[precision] = rows(hybrid.compare(job, STRATEGIES, 1, out / precision))
    return found


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return what a comparison says of each strategy."""
    found = []
    for name, run in comparison.strategies.items():
        parity = comparison.parity.get(name)
        equal = "reference" if name == comparison.reference else parity and parity.ok
        found.append(
            {
                "strategy": name,
                "status": run.status,
                "reason": run.reason,
                "equal": equal,
                "loss": parity.max_loss_diff if parity else None,
                "grad_norm": parity.max_grad_norm_diff if parity else None,
                "skipped": sum(step.skipped for step in run.steps),
                "memory": max(run.memory.peak_bytes) if run.memory else None,
                "step_s": run.throughput.step_s_median if run.throughput else None,
            }
        )
    return found


def speed_job(small: bool, steps: int, batch: int) -> Any:
    """Return the job whose speed is measured."""
    model = SMALL["model.options"] if small else {"preset": "124m"}
    data = SMALL["data.options"] if small else {"context": 1024, "max_bytes": 8_000_000}
    return hybrid.load_job(
        {
            "model": {"name": "gpt", "options": model},
            "data": {"name": "text", "options": data | {"validation": 0.005}},
            "optimizer": {"name": "adamw", "lr": 3e-4, "weight_decay": 0.1},
            "train": {
                "global_batch": batch,
                "steps": steps,
                "clip_norm": 1.0,
                "precision": "bf16",
                "compile": not small,
            },
        }
    )


def plain_loop(job: Any, device: torch.device) -> tuple[list[float], list[float]]:
    """Train the job's model by autocast and fused AdamW; return seconds and losses of each step."""
    model = hybrid.build_model(job)[0].whole().to(device)
    for layer in model if job.train.compile else ():
        layer.compile()
    samples, _ = hybrid.build_data(job)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.optimizer.lr, weight_decay=job.optimizer.weight_decay, fused=True
    )
    plan = hybrid.BatchPlan(len(samples), job.train.global_batch, 1, 1, job.train.seed)
    seconds, losses = [], []
    for step in range(job.train.steps):
        start = time.perf_counter()
        x, y = zip(*(samples[i] for i in plan.micro_batch_ids(step, 0)[0]), strict=True)
        inputs, targets = torch.stack(x).to(device), torch.stack(y).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(inputs).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # this also waits for the GPU
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def speed(out: Path, small: bool, device: torch.device) -> dict[str, Any]:
    """Return tokens/s, share of the peak and losses of the plain loop, the strategies, the loop."""
    job = speed_job(small, 12 if small else 40, 4 if small else 32)
    layers = hybrid.build_model(job)[0]
    blocks, context = len(layers) - 2, 16 if small else 1024
    width = layers[0].token.embedding_dim
    flops = 6 * sum(p.numel() for p in layers.names()) + 12 * blocks * width * context
    found = []

    def note(name: str, step_s: float, losses: list[float]) -> None:
        rate = job.train.global_batch * context / step_s
        mfu = rate * flops / PEAK_FLOPS
        row = {"name": name, "step_s": step_s, "tokens_per_s": rate, "mfu": mfu, "losses": losses}
        print(f"{name}: {1000 * step_s:.2f} ms, {rate:,.0f} tokens/s, MFU {mfu:.1%}", flush=True)
        found.append(row)

    def plain(name: str) -> None:
        torch.compiler.reset()  # each run compiles for itself
        seconds, losses = plain_loop(job, device)
        note(name, statistics.median(seconds[WARMUP:]), losses)

    plain("plain loop, before")
    for name in FAST:
        torch.compiler.reset()
        record = hybrid.train(job, name, out / name)
        assert record.throughput
        note(name, record.throughput.step_s_median, [step.loss for step in record.steps])
    plain("plain loop, after")
    return {"job": to_dict(job), "flops_per_token": flops, "runs": found}


def main(words: list[str] | None = None) -> None:
    """Everything; the tables and the JSON file. words: in place of those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", choices=["speed", "agreement"], help="left out: both")
    args = parser.parse_args(words)
    begin_by = time.monotonic() + (BEGIN_WITHIN_S if args.part is None else float("inf"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {"machine": f"{name}; {summarise_machine()}", "small": args.small}
    print(found["machine"], flush=True)
    if args.part != "agreement":
        found["speed"] = speed(args.out / "speed", args.small, device)
        records.write(found, args.out / "gpu.json")
    if args.part != "speed":
        found["agreement"] = agreement(args.out / "agreement", args.small, begin_by)
        records.write(found, args.out / "gpu.json")
    for precision, table in found.get("agreement", {}).items():
        print(f"\n{precision}{'' if table else ': not run, time was up'}")
        for row in table or ():
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
