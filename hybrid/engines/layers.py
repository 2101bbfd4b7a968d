"""This module prepares layers, alike under every strategy, and seeds each forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data.permutation import splitmix64
from ..job.schema import Job
from ..models.batch_norms import leave_padding_out, leaves_padding_out
from ..models.draws import draws_by_functions, seed_functions
from ..models.dropout import Dropout, RowSeeds, number_dropouts, set_rows, use_rows
from ..models.layers import Layers
from ..models.losses import GivenLoss, Loss
from ..models.own_loss import OwnLoss
from .compiled import compile_function, compile_layer
from .precision import DTYPES, round_inputs
from .recomputation import recomputed

_WEIGHTS = [splitmix64(i) for i in range(5)]  # of the numbers that a seed depends on


def prepare_layers(job: Job, layers: Layers) -> Layers:
    """Change the whole model's layers as the job asks, before any engine takes them.
    That is dropout by sample, inputs in the job's precision, checkpointing, compilation."""
    number_dropouts(layers.modules())
    if not job.train.compile:
        seed_functions(layers.modules())
    if not job.train.compile:  # torch.compile would leave each of these layers to Python
        leave_padding_out(layers.modules())
    round_inputs(layers, DTYPES[job.train.precision])
    for block in layers.blocks():
        # What has no parameters keeps little, and may change its input in place, as torchvision's
        # ReLUs do, so that it could not be computed again.
        if job.train.activation_checkpointing and any(True for _ in block.parameters()):
            kind = recomputed(type(block), job.train.compile)  # type: ignore[arg-type]
            block.__class__ = kind
        elif job.train.compile:
            compile_layer(block)
    return layers


def prepare_loss(job: Job, loss: Loss) -> Loss:
    """Compile a loss of torch's where the job compiles layers.

    A language model's logits are the largest tensor of a step. Operator by operator, a loss in fp32
    writes copies of them as large again four times, which takes an H100 a sixth of the step."""
    if not job.train.compile or isinstance(loss, (GivenLoss, OwnLoss)):
        return loss
    return CompiledLoss(loss)


class CompiledLoss:
    """Is a loss, compiled in training alone: an evaluation watches what it calls of torch."""

    def __init__(self, loss: Loss) -> None:
        self._loss, self._compiled = loss, compile_function(loss)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, output: Any, target: Any) -> Any:
        """Return the sum and the count, as the loss does."""
        return (self._compiled if torch.is_grad_enabled() else self._loss)(output, target)


def compile_evidence(job: Job) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return what torch.compile really made in this process, and the condition on it.
    torch.compile leaves out a layer that it cannot compile, and says nothing."""
    if not job.train.compile:
        return {}, {}
    from torch._dynamo.utils import counters

    graphs = int(counters["stats"]["unique_graphs"])
    return {"compiled_graphs": graphs}, {"layers are compiled": graphs > 0}


def sample_seeds(
    job: Job, step: int, place: Sequence[int], ids: torch.Tensor, rows: int
) -> use_rows:
    """Seed one training forward pass on `rows` rows: the samples `ids` (int64 [n]), then padding.

    The generators are seeded at once, the rows while the context lasts that this returns.

    Our dropout is seeded by sample. torch's own generator is seeded by `place` (share, micro-batch,
    stage), so that all other random numbers are the same in two runs of one layout."""
    seed_forward_pass(job.train.seed, step, *place)
    return use_rows(RowSeeds(ids, rows, job.train.seed, step))


def set_sample_seeds(
    job: Job, step: int, place: Sequence[int], ids: torch.Tensor, rows: int
) -> None:
    """Seed all forward passes until the next call, for an engine that calls the model by itself.
    The arguments are those of `sample_seeds`."""
    seed_forward_pass(job.train.seed, step, *place)
    set_rows(RowSeeds(ids, rows, job.train.seed, step))


def asks_for_rows(model: nn.Module) -> bool:
    """Tell whether a model that has made a training step asks for the seeds of rows.

    Its dropouts do, and functions that drop, and batch norms, which leave padding out."""
    return any(
        isinstance(module, Dropout) or draws_by_functions(module) or leaves_padding_out(module)
        for module in model.modules()
    )


def seed_forward_pass(
    seed: int, step: int, share: int = 0, micro_batch: int = 0, stage: int = 0
) -> None:
    """Seed the generators that a model draws from, as `torch.manual_seed` does.

    That takes 129 us, and more in a deep stack: it also formats the stack for every other kind of
    device. This takes 2 us, so that models which draw nothing are seeded too. The sum has a weight
    of 64 random bits for each number, so that no two places in a run have one seed."""
    a, b, c, d, e = _WEIGHTS
    mixed = splitmix64(seed * a + step * b + share * c + micro_batch * d + stage * e)
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(mixed)
