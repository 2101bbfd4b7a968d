"""A hand-written loop on DeepSpeed's pipeline, as its "Pipeline Parallelism" tutorial shows it.

The GPT's embedding and head share a weight by `TiedLayerSpec`. With several columns (`two_d.py`)
the data-parallel ranks run ZeRO-1.
"""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn
from torch.nn import functional

from .workloads import Workload


def make(workload: Workload, reads: bool = False) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: it also reads the loss and DeepSpeed's gradient norm, if there is one, as numbers."""
    columns = workload.columns
    layers: list[Any] = workload.layers()
    module = PipelineModule(
        tie(layers) if workload.name == "gpt" else layers,
        topology=PipeDataParallelTopology(num_pp=workload.stages, num_dp=columns),
        loss_fn=workload.loss,
        partition_method="uniform",
    )
    optimizer = workload.optimizer(module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=workload.schedule(optimizer),
        config=workload.deepspeed_config(stage=1 if columns > 1 else 0),
        dist_init_required=False,
    )
    next_batches = workload.micro_batches()

    def step() -> Any:
        loss = engine.train_batch(data_iter=iter(next_batches()))
        if not reads:
            return [loss]
        float(engine.get_global_grad_norm() or 0.0)
        return loss.item()

    return step


class TiedEmbedding(nn.Module):
    """Holds the weight that both ends of the GPT use."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids to vectors."""
        return functional.embedding(ids, self.weight)


def tie(layers: list[Any]) -> list[Any]:
    """Describe the GPT's layers to DeepSpeed, as many as before: the last norm joins a block."""
    weight = layers[0].token.weight

    def head(embedding: TiedEmbedding, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, embedding.weight)

    first = TiedLayerSpec("embedding", TiedEmbedding, weight)
    last = TiedLayerSpec("embedding", TiedEmbedding, weight, forward_fn=head)
    return [first, *layers[1:-2], nn.Sequential(layers[-2], layers[-1].norm), last]
