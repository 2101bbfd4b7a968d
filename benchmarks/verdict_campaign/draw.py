"""Draws random small jobs and planted faults, each by its seed alone. No torch here."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from typing import Any

from .kinds import KINDS, Fault, Kind

ALL = ("ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3", "pipeline", "2d")
WITHOUT_DEEPSPEED = ("ddp", "local_sgd", "fsdp")  # DeepSpeed refuses fp16 on most CPUs
CLIPS_ELSEWHERE = ("pipeline", "2d", "zero1")  # in bf16, by a function that no fault replaces
HERE = __package__
OWN = {"gpt": "gpt"}  # families that are hybrid's own, by their names in a job
EARLY_STEPS = 20  # a fault after these stands where controls may excuse a difference in fp32


@dataclasses.dataclass(frozen=True)
class DrawnJob:
    """Holds a job as sections of a job file, its strategies, and the number of processes."""

    seed: int
    sections: dict[str, Any]
    strategies: tuple[str, ...]
    nproc: int

    def describe(self) -> str:
        """Say in some words what is trained how."""
        model, train = self.sections["model"], self.sections["train"]
        optimizer = self.sections["optimizer"]
        return (
            f"{model['name'].rpartition(':')[2]}, {optimizer['name']} at {optimizer['lr']:.2g}, "
            f"{train['precision']}, {train['steps']} steps of {train['global_batch']} in "
            f"{train['micro_batches']}, {self.nproc} processes"
        )


@dataclasses.dataclass(frozen=True)
class DrawnFault:
    """Holds a fault and the job in which it is planted, under one strategy."""

    job: DrawnJob
    fault: Fault

    def is_late(self) -> bool:
        """Tell whether it begins in the last step, or so late that controls may excuse it."""
        last = self.job.sections["train"]["steps"] - 1
        return self.fault.step == last or self.fault.step > EARLY_STEPS


def draw_job(seed: int) -> DrawnJob:
    """Draw architecture, loss, optimizer, precision, steps, sizes, strategies and processes."""
    draw = random.Random(f"job {seed}")
    nproc = draw.choice([2, 2, 2, 4])
    train = {
        "global_batch": draw.randint(6, 33),
        "micro_batches": draw.choice([1, 1, 2, 3, 4]),
        "steps": draw.randint(1, 60),
        "precision": draw.choices(["fp32", "bf16", "fp16"], [6, 3, 1])[0],
        "clip_norm": draw.choice([0.0, 0.0, 0.1, 0.5, 1.0]),
        "seed": seed,
    }
    possible = WITHOUT_DEEPSPEED if train["precision"] == "fp16" else ALL
    possible = tuple(name for name in possible if name != "2d" or nproc == 4)
    sections = {
        **_model_and_data(draw, seed, draw.choice([0.0, 0.0, 0.1])),
        "optimizer": _optimizer(draw, wild=True),
        "schedule": _schedule(draw, train["steps"]),
        "train": train,
        "strategy": _settings(draw, train["precision"]),
    }
    strategies = sorted(draw.sample(possible, 3), key=ALL.index)
    return DrawnJob(seed, sections, tuple(strategies), nproc)


def draw_fault(seed: int) -> DrawnFault:
    """Draw a kind, a strategy, a step and a job in which the fault can act.

    Kinds come in turn, so that each is drawn as often. The jobs are tamer than those of `draw_job`,
    so that few diverge, and nothing about them is odd, so that the fault alone can show."""
    draw = random.Random(f"fault {seed}")
    name = list(KINDS)[seed % len(KINDS)]
    kind = KINDS[name]
    strategy = draw.choice([s for s in ALL if kind.strategies is None or s in kind.strategies])
    train = _train_of_fault(draw, kind, strategy) | {"seed": seed}
    optimizer = _optimizer(draw, wild=False) | dict(kind.optimizer)
    if kind.optimizer.get("name") == "adamw":
        optimizer |= {"lr": 1e-3}
        optimizer.pop("momentum", None)
    dropout = 0.2 if kind.dropout else 0.0
    sections = {
        **_model_and_data(draw, seed, dropout, ("perceptron", "transformer", "gpt")),
        "optimizer": optimizer,
        "train": train,
        "strategy": {"local_sgd": {"sync_every": draw.choice([1] if kind.merges else [1, 2])}},
    }
    # A short last batch would leave micro-batches empty, in which a fault changes nothing.
    sections["data"]["options"]["samples"] = train["global_batch"] * draw.randint(2, 5)
    nproc = 4 if strategy == "2d" else 2
    fault = Fault(
        kind=name,
        strategy=strategy,
        step=_step(draw, kind, train["steps"]),
        once=draw.random() < 0.5,
        size=draw.choice(kind.sizes),
        tensor=draw.randrange(100),
    )
    return DrawnFault(DrawnJob(seed, sections, (strategy,), nproc), fault)


def _train_of_fault(draw: random.Random, kind: Kind, strategy: str) -> dict[str, Any]:
    """Draw steps, batch and precision such that the kind of fault can act."""
    precision = draw.choices(["fp32", "bf16"], [7, 3])[0]
    if kind.fp32_only or (kind.clips and strategy in CLIPS_ELSEWHERE):
        precision = "fp32"
    return {
        "global_batch": draw.choice([16, 18, 20, 24]),
        "micro_batches": draw.choice([2, 3] if kind.micro_batches else [1, 2]),
        "steps": draw.choice([5, 12, 12, 30, 40]),
        "precision": precision,
        "clip_norm": 0.1 if kind.clips else 0.0,
    }


def _step(draw: random.Random, kind: Kind, steps: int) -> int:
    """Draw an early step, the last one, or one late enough that controls may excuse it."""
    if kind.step is not None:
        return kind.step % steps
    first, end = kind.first_step, steps + kind.last_step
    places = [first, draw.randint(first, end), end]
    if end > EARLY_STEPS:
        places += [draw.randint(EARLY_STEPS + 1, end)] * 2
    return draw.choice(places)


def _model_and_data(
    draw: random.Random, seed: int, dropout: float, families: Sequence[str] | None = None
) -> dict[str, Any]:
    """Draw a model of one of the families, with data that fit it."""
    family = draw.choice(families or list(FAMILIES))
    samples = draw.randint(40, 120)
    model, data, name = FAMILIES[family](draw, dropout)
    data |= {"samples": samples, "seed": seed}
    return {
        "model": {"name": OWN.get(family, f"{HERE}.models:{family}"), "options": model},
        "data": {"name": f"{HERE}.samples:{name}", "options": data},
    }


def _target(draw: random.Random) -> tuple[str, bool]:
    """Draw a loss, and say whether it takes classes."""
    loss = draw.choice(["cross_entropy", "cross_entropy", "squared_error", "huber"])
    return loss, loss == "cross_entropy"


def _perceptron(draw: random.Random, dropout: float) -> tuple[dict[str, Any], dict[str, Any], str]:
    loss, classes = _target(draw)
    sizes = [draw.choice([7, 12, 32]), *(draw.randint(8, 40) for _ in range(draw.randint(3, 5)))]
    outputs = draw.choice([2, 5, 10])
    norm = draw.random() < 0.4
    model = {"sizes": [*sizes, outputs], "activation": _activation(draw), "norm": norm}
    data = {"shape": [sizes[0]], "outputs": outputs, "classes": classes}
    return model | {"dropout": dropout, "loss": loss}, data | {"ignored": _ignored(draw)}, "numbers"


def _residual(draw: random.Random, dropout: float) -> tuple[dict[str, Any], dict[str, Any], str]:
    loss, classes = _target(draw)
    features, outputs = draw.choice([7, 12, 20]), draw.choice([3, 10])
    model = {"features": features, "width": draw.randint(9, 30), "depth": draw.randint(2, 4)}
    model |= {"outputs": outputs, "activation": _activation(draw), "loss": loss}
    data = {"shape": [features], "outputs": outputs, "classes": classes}
    return model, data | {"ignored": _ignored(draw)}, "numbers"


def _convolution(draw: random.Random, dropout: float) -> tuple[dict[str, Any], dict[str, Any], str]:
    loss, classes = _target(draw)
    outputs = draw.choice([3, 10])
    channels = [draw.randint(3, 9) for _ in range(draw.randint(3, 4))]
    model = {"channels": channels, "activation": _activation(draw), "norm": draw.random() < 0.5}
    data = {"shape": [1, 8, 8], "outputs": outputs, "classes": classes}
    return model | {"outputs": outputs, "loss": loss}, data | {"ignored": _ignored(draw)}, "numbers"


def _transformer(draw: random.Random, dropout: float) -> tuple[dict[str, Any], dict[str, Any], str]:
    heads = draw.choice([1, 2, 3])
    tokens, vocabulary = draw.choice([5, 8, 12]), draw.choice([17, 61, 101])
    model = {"num_layers": draw.choice([2, 3, 5]), "width": 8 * heads, "num_heads": heads}
    model |= {"vocab_size": vocabulary, "tokens": tokens, "activation": _activation(draw)}
    model |= {"dropout": dropout, "tied": draw.random() < 0.5}
    data = {"tokens": tokens, "vocab_size": vocabulary, "ignored": _ignored(draw)}
    return model, data, "tokens"


def _gpt(draw: random.Random, dropout: float) -> tuple[dict[str, Any], dict[str, Any], str]:
    model, data, name = _transformer(draw, dropout)
    del model["activation"]
    positions = draw.choice(["rope", "learned"])
    return model | {"context": model.pop("tokens"), "positions": positions}, data, name


def _bag(draw: random.Random, dropout: float) -> tuple[dict[str, Any], dict[str, Any], str]:
    loss, classes = _target(draw)
    vocabulary, outputs = draw.choice([17, 61, 101]), draw.choice([3, 10])
    model = {"vocab_size": vocabulary, "width": draw.randint(8, 24), "depth": draw.randint(1, 3)}
    model |= {"outputs": outputs, "activation": _activation(draw), "loss": loss}
    data = {"tokens": draw.choice([4, 9]), "vocab_size": vocabulary}
    return model, data | {"outputs": outputs, "classes": classes}, "bags"


FAMILIES = {
    "perceptron": _perceptron,
    "residual": _residual,
    "convolution": _convolution,
    "transformer": _transformer,
    "gpt": _gpt,
    "bag": _bag,
}


def _activation(draw: random.Random) -> str:
    return draw.choice(["relu", "tanh", "gelu"])


def _ignored(draw: random.Random) -> float:
    return draw.choice([0.0, 0.0, 0.2])


def _optimizer(draw: random.Random, wild: bool) -> dict[str, Any]:
    """Draw an optimizer; wild: with rates from small to large, else with one that trains."""
    decay = draw.choice([0.0, 0.0, 0.01, 0.1])
    kinds = draw.choice([[], ["biases"], ["norms", "biases"]]) if decay and wild else []
    common = {"weight_decay": decay, "no_decay": kinds}
    if draw.random() < 0.5:
        lr = 10 ** draw.uniform(-3, -0.3) if wild else draw.choice([0.02, 0.1])
        return {"name": "sgd", "lr": lr, "momentum": draw.choice([0.0, 0.9])} | common
    lr = 10 ** draw.uniform(-4, -1.5) if wild else draw.choice([1e-3, 3e-3])
    betas = draw.choice([[0.9, 0.999], [0.9, 0.95]])
    return {"name": "adamw", "lr": lr, "betas": betas} | common


def _schedule(draw: random.Random, steps: int) -> dict[str, Any]:
    name = draw.choice(["constant", "linear", "cosine"])
    return {"name": name, "warmup_steps": draw.choice([0, 0, min(3, steps - 1)])}


def _settings(draw: random.Random, precision: str) -> dict[str, Any]:
    """Draw settings of the strategies that change the order of sums and nothing else."""
    zero_stage = draw.choice([0, 1]) if precision == "fp32" else 1
    return {
        "local_sgd": {"sync_every": draw.choice([1, 3, "epoch"])},
        "fsdp": {"reshard_after_forward": draw.random() < 0.5},
        "zero2": {"reduce_once": draw.random() < 0.5},
        "2d": {"zero_stage": zero_stage},
    }


def to_text(fault: Fault) -> str:
    """Return a fault as one word of a command line."""
    return json.dumps(dataclasses.asdict(fault), separators=(",", ":"))
