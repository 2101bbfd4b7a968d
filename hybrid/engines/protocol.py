"""The protocol that every engine keeps, and what passes between an engine and the training loop.

An engine trains whole optimizer steps, the smallest unit that all engines share: DeepSpeed's
pipeline offers no smaller one. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..layout import Layout
from ..records import EvalResult, Receipt

if TYPE_CHECKING:
    import torch

    from ..data.loader import MicroBatch


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank. Digests are hexadecimal, one a rank in
    `digest_by_rank` ("" where a rank computes no loss). `targets` were counted by the loss;
    `loss_scale` and `skipped` are fp16's: a step whose gradients overflowed changes nothing."""

    loss: float
    grad_norm: float
    lr: float
    samples: int
    sample_digest: str
    digest_by_rank: tuple[str, ...] = ()
    targets: int = 0
    loss_scale: float | None = None
    skipped: bool = False


class Engine(Protocol):
    """A model being trained. Every method is collective: all ranks call it together.

    `shares` are the data-parallel ranks whose samples this process computes (all but an emulation
    have one); `micro_batch_size` is the fixed number of rows a micro-batch must have, None where
    any will do; `num_held` is how many trained parameters this process holds.
    """

    layout: Layout
    shares: tuple[int, ...]
    micro_batch_size: int | None
    num_held: int

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """One optimizer step on the micro-batches of this process's shares, share after share."""
        ...

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        """Loss and counts over all ranks' batches; every rank passes equally many."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Full parameters and buffers by canonical name (layer index, dot, name in the layer), on
        the CPU of rank 0; empty elsewhere."""
        ...

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` gave; every rank passes all of it."""
        ...

    def receipt(self) -> Receipt:
        """What really runs, read off the live objects of all ranks. `evidence["precision"]` is its
        ledger, which the loop completes."""
        ...

    def close(self) -> None:
        """Release what the engine holds; the process group is the caller's."""
        ...


def refuse_unless(conditions: Mapping[str, bool]) -> str | None:
    """The first condition, worded as what should have been, that does not hold; None if all do."""
    return next((what for what, holds in conditions.items() if not holds), None)


def make_receipt(evidence: dict[str, Any], conditions: Mapping[str, bool]) -> Receipt:
    """A receipt that is engaged when every condition holds on the evidence."""
    reason = refuse_unless(conditions)
    return Receipt(reason is None, evidence, reason and f"not so: {reason}")


def extend_receipt(
    receipt: Receipt, evidence: dict[str, Any], conditions: Mapping[str, bool]
) -> Receipt:
    """A receipt with more evidence, on which these conditions must hold as well."""
    more = make_receipt(receipt.evidence | evidence, conditions)
    return more if receipt.engaged else Receipt(False, more.evidence, receipt.reason)
