"""Lists the kinds of faults that are planted, with what a job needs so that they can act."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

REPLICATED = ("ddp", "fsdp", "zero1", "zero2", "zero3", "2d")  # several ranks give one gradient
TORCH_CLEARS = ("ddp", "fsdp", "local_sgd")  # where torch's optimizer clears the gradients


@dataclasses.dataclass(frozen=True)
class Fault:
    """Names a fault, and says where it acts.

    step: the first step in which it acts, from 0; once: in no other step. size: of what the kind
    scales. tensor: which tensor it picks, counted around."""

    kind: str
    strategy: str
    step: int
    once: bool
    size: float
    tensor: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """Describes a kind of fault, and what it needs.

    strategies: those in which it can act, None for all. sizes: those that are drawn. first_step:
    the first one in which it changes something. last_step: the last such, as a list's index. step:
    the only such, as a list's index. The others say what the job must have."""

    words: str
    strategies: Sequence[str] | None = None
    sizes: Sequence[float] = (0.0,)
    first_step: int = 0
    last_step: int = -1
    step: int | None = None
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    micro_batches: bool = False  # several
    merges: bool = False  # after each step
    clips: bool = False
    dropout: bool = False
    fp32_only: bool = False


ADAM = {"name": "adamw"}
KINDS = {
    "gradient_not_reduced": Kind("one rank's gradient of one tensor is lost", REPLICATED),
    "loss_scaled": Kind("the loss is scaled by a factor", sizes=(1.5, 1.1, 1.03, 1.003)),
    "sample_repeated": Kind("one rank computes its first sample in place of all"),
    "inputs_shifted": Kind("one rank pairs its inputs with the targets of others"),
    "rate_of_one_rank": Kind(
        "one stage or rank steps by another rate", sizes=(10.0, 2.0, 1.1, 1.01)
    ),
    "rate_of_one_group": Kind(
        "parameters without decay step by another rate",
        sizes=(2.0, 1.1),
        optimizer=ADAM | {"weight_decay": 0.1, "no_decay": ["norms", "biases"]},
    ),
    "gradients_not_cleared": Kind("a step's gradients are not cleared", TORCH_CLEARS, last_step=-2),
    "micro_batch_dropped": Kind("one rank's last micro-batch has no gradient", micro_batches=True),
    "clipped_by_part": Kind("gradients are clipped by the norm of a part of them", clips=True),
    "decay_twice": Kind(
        "weight decay is applied twice", sizes=(2.0,), optimizer=ADAM | {"weight_decay": 0.1}
    ),
    "update_lost": Kind("a part of one tensor keeps its value in a step"),
    "start_apart": Kind("one tensor starts off by a relative 1e-6", sizes=(1e-6,), step=0),
    "other_dropout": Kind("one rank drops other units", dropout=True),
    "adam_step_off": Kind("AdamW counts one step too many", optimizer=ADAM, first_step=1),
    "last_step_not_made": Kind("the last update is not made", step=-1),
    "gradient_rounded": Kind("fp32 gradients are rounded to bf16 before a step", fp32_only=True),
    "state_lost": Kind("the optimizer's moments are set to zero", optimizer=ADAM, first_step=1),
    "merge_incomplete": Kind("one tensor is left out of the average", ("local_sgd",), merges=True),
}
