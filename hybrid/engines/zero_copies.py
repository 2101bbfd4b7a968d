"""This module spares ZeRO-3 its second copies of a rank's parameters and gradients in fp32."""

from typing import Any

import torch


def keep_one_copy(optimizer_class: Any) -> None:
    """Have ZeRO-3's optimizer, of this class, step parameters in fp32 themselves.

    DeepSpeed means to, but compares their `torch.device` with its name, which never are equal, and
    steps a copy (0.19.8, `_create_fp32_partitions`). test_workarounds.py tells when this can go."""
    create = optimizer_class._create_fp32_partitions
    if hasattr(create, "found"):
        return

    def create_shared(self: Any) -> None:
        name = self.device
        if not self.offload_optimizer and not self.offload_param:
            self.device = torch.device(name)
        try:
            create(self)
        finally:
            self.device = name

    create_shared.found = create  # type: ignore[attr-defined]
    optimizer_class._create_fp32_partitions = create_shared


def step_on_gradients(optimizer: Any) -> None:
    """Have ZeRO-3's optimizer step on the gradients that it has summed, not on a copy of them.

    These lie as the optimizer wants them, one after another. DeepSpeed would copy them for a step,
    and scale and clip the copy (0.19.8, `_prepare_fp32_grad_for_sub_group`)."""
    sums: torch.Tensor = optimizer.grad_partitions_flat_buffer
    sizes: list[int] = optimizer.fp16_partitioned_groups_flat_numel

    def prepare(group: int) -> None:
        flat = optimizer.fp32_partitioned_groups_flat[group]
        flat.grad = sums.narrow(0, sum(sizes[:group]), flat.numel())
        optimizer.averaged_gradients[group] = None

    masters = optimizer.fp32_partitioned_groups_flat
    if not optimizer.offload_optimizer and all(sums.dtype == flat.dtype for flat in masters):
        optimizer._prepare_fp32_grad_for_sub_group = prepare
