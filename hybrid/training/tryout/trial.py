"""This module holds a model, its loss and some samples, and runs them forward as a rank would."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import nn

from ...data.loader import MicroBatch, copied, load_micro_batch
from ...engines.layers import prepare_layers, sample_seeds
from ...job.errors import JobError, RunError, tell_error
from ...job.schema import Job
from ...job.users_code import passes
from ...models.layers import Layers
from ...models.loss_calls import LossCalls
from ...models.losses import Loss
from ...models.own_loss import OwnLoss, model_input
from .nested import map_tensors

SAMPLES = 8
# Of a large model, fewer samples: a pass over eight sequences of 128 tokens takes 0.4 s there.
LARGE, FEW = 5_000_000, 3


class Trial:
    """Runs one model on samples of one set, each time from the same buffers and seeds.

    batch: the first samples of the set. Passes are in fp32, whatever the job computes in. What the
    user's code raises is a JobError with the line of theirs."""

    def __init__(self, job: Job, layers: Layers, loss: Loss, samples: Sequence[Any]) -> None:
        self.job, self.loss, self.samples = job, loss, samples
        self.model_name = f"model.name = {job.model.name!r}"
        self.data_name = f"data.name = {job.data.name!r}"
        self.names = layers.names()
        self.sizes = sum(p.numel() for p in self.names)
        plain = {"precision": "fp32", "activation_checkpointing": False, "compile": False}
        train = job.train.model_copy(update=plain)
        prepared = prepare_layers(job.model_copy(update={"train": train}), layers)
        self.modules = prepared.modules()
        self.model: nn.Module = prepared.whole().train()
        self.buffers = {n: b.detach().clone() for n, b in self.model.named_buffers()}
        count = FEW if self.sizes > LARGE else SAMPLES
        self.ids = list(range(min(len(samples), count)))
        self.batch = self.load(self.ids)
        if isinstance(loss, OwnLoss) and not any(t.is_meta for t in self.buffers.values()):
            with torch.no_grad(), LossCalls() as watched:
                output = self.forward(self.batch.input, self.ids)
            loss.learn(watched.calls, output, self.batch.target)

    def load(
        self, ids: list[int], samples: Sequence[Any] | None = None, size: int | None = None
    ) -> MicroBatch:
        """Return some samples as a micro-batch, of the train set or of another one.

        size: the rows to which a pipeline would pad it."""
        name = "train" if samples is None else "test"
        try:
            batch = load_micro_batch(self.samples if samples is None else samples, ids, size)
            given = model_input(self.loss, batch.input, batch.target)
            return dataclasses.replace(batch, input=given)
        except RunError as error:  # it names the set and the sample
            raise JobError(str(error)) from error
        except BaseException as error:  # a user's data set may raise anything
            if passes(error):
                raise
            words = f"samples {ids[0]} to {ids[-1]}" if len(ids) > 1 else f"sample {ids[0]}"
            raise JobError(
                f"{self.data_name}: {words} of the {name} set: {tell_error(error)}"
            ) from error

    def forward(self, given: Any, ids: Sequence[int], torch_seed: int = 0, other: int = 0) -> Any:
        """Return the model's output for an input whose rows are these samples.

        torch_seed, other: what torch's generator, and those of random and numpy, start from.
        Dropout by sample draws the same for any of them."""
        self.restore()
        rows = torch.tensor(list(ids), dtype=torch.int64)
        random.seed(other)
        numpy.random.seed(other)
        try:
            with sample_seeds(self.job, 0, (torch_seed,), rows, len(rows)):
                return self.model(copied(given))  # which it may change in place
        except BaseException as error:  # a user's layer may raise anything
            if passes(error):
                raise
            raise JobError(
                f"{self.model_name}: with an input of {describe(given)} from {self.data_name} the "
                f"model raised {tell_error(error)}"
            ) from error

    def evaluate(self, batch: MicroBatch, ids: Sequence[int], graph: bool = False) -> Any:
        """Return the output, and the loss, in the mode for evaluation; graph: with a graph."""
        self.model.eval()
        try:
            with torch.set_grad_enabled(graph):
                output = self.forward(batch.input, ids)
                return output, self.take_loss(output, batch.target)[0]
        finally:
            self.model.train()

    def take_loss(self, output: Any, target: Any) -> tuple[torch.Tensor, Any]:
        """Return what the loss gives: a sum that is one number, and a count.

        It gets copies, since it may change what it is given."""
        output, target = map_tensors(output, torch.clone), copied(target)
        try:
            given = self.loss(output, target)
        except JobError as error:  # one of torch's losses does not take these
            raise JobError(f"{self.model_name}: {error}") from error
        except BaseException as error:  # a user's loss may raise anything
            if passes(error):
                raise
            raise JobError(
                f"{self.model_name}: with an output of {describe(output)} and a target of "
                f"{describe(target)} the loss raised {tell_error(error)}"
            ) from error
        wrong = _wrong_loss(given)
        if wrong:
            raise JobError(f"{self.model_name}: the loss returned {wrong}")
        return given

    def restore(self) -> None:
        """Put the buffers back to where they were before the first pass.

        A graph may hold them, and would refuse a backward if it saw this: hence `data`."""
        for name, buffer in self.model.named_buffers():
            if name in self.buffers and buffer.shape == self.buffers[name].shape:
                buffer.data.copy_(self.buffers[name])

    def free(self) -> None:
        """Drop gradients and put buffers back: a module that the user keeps is as it was."""
        self.restore()
        self.model.zero_grad(set_to_none=True)


def _wrong_loss(given: Any) -> str | None:
    """Say what is wrong with what a loss returned, None where it is a sum and a count."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return f"{describe(given)}; valid: (sum, count), summed over the targets that it counted"
    total, count = given
    if not isinstance(total, torch.Tensor):
        return f"{describe(total)} as the sum; valid: a tensor that has a gradient, not a number"
    if total.dim():
        return f"a sum of shape {list(total.shape)}; valid: one number, so add .sum()"
    if not total.is_floating_point():
        return f"{describe(total)} as the sum; valid: a floating number that has a gradient"
    if isinstance(count, torch.Tensor) and count.numel() == 1:
        count = count.item()
    if isinstance(count, bool) or not isinstance(count, (int, float)):
        return f"{describe(count)} as the count; valid: the number of targets that it summed over"
    if not 0 <= count < float("inf"):
        return f"a count of {count}; valid: the number of targets that it summed over"
    return None


def describe(value: Any) -> str:
    """Describe a value by shapes and dtypes: `float32 [8, 16]`."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {describe(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (tuple, list)) and value:
        return "(" + ", ".join(map(describe, value)) + ")"
    return f"a {type(value).__name__}"
