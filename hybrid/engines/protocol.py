"""This module has the protocol of every engine, and what passes between it and the training loop.

An engine trains whole optimizer steps. This is the smallest unit that all engines share:
DeepSpeed's pipeline offers no smaller one. The module needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..layout import Layout
from ..records import EvalResult, Receipt

if TYPE_CHECKING:
    import torch

    from ..checkpoint.pieces import Piece
    from ..data.loader import MicroBatch
    from .guard import Guard

    # What a checkpoint has: dtype and shape, by a tensor's canonical name and its key.
    Shapes = Mapping[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]
else:
    Shapes = Any


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Holds the result of one optimizer step, the same on every rank.

    Digests are hexadecimal. `digest_by_rank` has one a rank, "" where a rank computes no loss.
    `grad_norm` is taken before clipping; None in steps between two that are logged. `targets` is
    how many the loss counted. `loss_scale` is fp16's: a step whose gradients overflowed is
    `skipped`, it changes nothing. So is one that the guard held back, for its `fault`. `stop` is
    the number of the signal that told one of the ranks to stop, 0 where none was."""

    loss: float
    grad_norm: float | None
    lr: float
    samples: int
    sample_digest: str
    digest_by_rank: tuple[str, ...] = ()
    targets: int | float = 0
    loss_scale: float | None = None
    skipped: bool = False
    stop: int = 0
    fault: str | None = None


class OwnState(NamedTuple):
    """Holds what belongs to one rank alone, which another layout has no use for."""

    tensors: Mapping[str, torch.Tensor]
    numbers: Mapping[str, Any]  # as JSON


class Engine(Protocol):
    """Trains a model. Every method is collective: all ranks call it together.

    `shares` are the data-parallel ranks whose samples this process computes (all but an emulation
    have one). `micro_batch_size` is the fixed number of rows that a micro-batch must have, or None
    if any number will do. `reads_inputs` and `reads_targets` tell which parts of a micro-batch this
    process uses. `num_held` is how many trained parameters it holds. `notes` are warnings: what
    a run could not take over from a checkpoint, or does not do as the model's code asks. `step` is
    how many optimizer steps are done. `guard` is there where the job has [guard]."""

    layout: Layout
    shares: tuple[int, ...]
    micro_batch_size: int | None
    reads_inputs: bool
    reads_targets: bool
    num_held: int
    notes: list[str]
    step: int
    guard: Guard | None = None

    def start_step(
        self,
        micro_batches: Sequence[MicroBatch],
        count: int | float | None = None,
        samples: int | None = None,
    ) -> None:
        """Make one optimizer step on the micro-batches of this process's shares, share by share.

        It does not wait for the other ranks' numbers, which travel while the next step runs. count,
        samples: the targets and the samples of all ranks in this step; what is left out and needed,
        the ranks tell one another."""

    def results(self, wait: bool = True) -> list[StepResult]:
        """Return the results of the steps since the last call, in order.

        wait: of all steps. Else those alone whose numbers were sent before the last step."""

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Make one step as `start_step` does, and wait for its result."""

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        """Return the loss and counts over all ranks' batches; every rank passes equally many."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return full parameters and buffers on the CPU of rank 0, and nothing on other ranks.
        The keys are canonical names: the layer's index, a dot, the name in the layer."""

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned; every rank passes all of it."""

    def pieces(self) -> list[Piece]:
        """Return this rank's live parts of the training state.

        They are weights in fp32, the optimizer's state, and buffers. Values that are written into
        them count from `begin_at` on. Between `make_room` and `begin_at` they are there to be
        written, else to be read."""

    def weights(self) -> list[Piece]:
        """Return this rank's live parts of parameters, in fp32, and buffers, to be read.

        Of replicas that differ, each process shows parts of its first."""

    def make_room(self, shapes: Shapes, numbers: Collection[str]) -> None:
        """Make the optimizer's state that is not there yet, for what a checkpoint has.

        numbers: the keys under which its optimizer kept numbers, not tensors."""

    def numbers_kept(self) -> list[str]:
        """Return the keys under which the optimizer keeps numbers, not tensors."""

    def optimizer_numbers(self) -> dict[str, Any]:
        """Return, as JSON, what an optimizer of a user's own holds beside the state by parameter.

        These are numbers in its groups that it changes, and keys under which it keeps None."""

    def set_optimizer_numbers(self, saved: Mapping[str, Any]) -> None:
        """Take over what `optimizer_numbers` returned, after the pieces have been written."""

    def stepper(self) -> torch.optim.Optimizer | None:
        """Return the optimizer whose `step` alone changes the pieces that are no weights.

        A checkpoint can copy them until that is called. None: something else may change them."""

    def loss_scale_state(self) -> dict[str, float] | None:
        """Return fp16's `scale`, and how many `good_steps` it has been in force; else None."""

    def own_state(self) -> OwnState:
        """Return what belongs to this rank alone, beside the pieces."""

    def rehearse(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Do what later steps are shaped by, before a checkpoint is loaded.

        DDP orders its buckets by the first backward pass. This may change the state."""

    def begin_at(
        self, step: int, loss_scale: Mapping[str, float] | None, own: OwnState | None
    ) -> None:
        """Go on after `step` optimizer steps, with what was written into the pieces.

        own: what `own_state` of this rank returned, None where the layout was another one. Its
        tensors are read when they are asked for; labels of others, such as `rng/`, are among them.
        """

    def skip_to(self, step: int) -> None:
        """Go on after `step` steps, those since the last one skipped; collective."""

    def receipt(self) -> Receipt:
        """Return what really runs, read off the live objects of all ranks.

        `evidence["precision"]` is its ledger, to which the loop adds a row."""

    def close(self) -> None:
        """Release what the engine holds; the process group belongs to the caller."""


def make_receipt(evidence: dict[str, Any], conditions: Mapping[str, bool]) -> Receipt:
    """Make a receipt that is engaged if every condition holds on the evidence.
    Each condition is worded as what should be; the reason quotes the first that does not hold."""
    broken = next((what for what, holds in conditions.items() if not holds), None)
    return Receipt(broken is None, evidence, broken and f"not so: {broken}")


def extend_receipt(
    receipt: Receipt, evidence: dict[str, Any], conditions: Mapping[str, bool]
) -> Receipt:
    """Return a receipt with more evidence, on which these conditions must hold as well."""
    more = make_receipt(receipt.evidence | evidence, conditions)
    return more if receipt.engaged else Receipt(False, more.evidence, receipt.reason)
