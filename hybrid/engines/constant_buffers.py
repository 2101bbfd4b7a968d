"""This module stops DDP from broadcasting buffers that no forward pass changes, in every step.

By default DDP sends all buffers, such as rotary tables, from rank 0 before each forward pass."""

from typing import Any

import torch

from ..job.errors import RunError
from ..launch.exchange import gather_objects
from .buffers import copy_buffers, moved_buffers


class ConstantBuffers:
    """Sees in the first step whether any rank's buffers change; if none do, the broadcast ends."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before = copy_buffers(model.module)
        # What is constant: its name, where its module holds it, the tensor, its version.
        self.constant: list[tuple[str, dict[str, Any], str, torch.Tensor, int]] = []

    def after_step(self, step: int) -> None:
        """Look at the buffers; collective after the first step.

        Raises RunError where a buffer changes that did not in the first step: ranks would then
        compute with different ones."""
        if self.before:
            changed = bool(moved_buffers(self.model.module, self.before))
            if not any(gather_objects(changed)):
                self.model.broadcast_buffers = False
                buffers = self.model.module.named_buffers()
                self.constant = [self._place(name, tensor) for name, tensor in buffers]
            self.before = {}
        for name, held, key, tensor, version in self.constant:
            if held[key] is not tensor or tensor._version != version:
                raise RunError(
                    f"step {step}: the buffer {name} changed, which it did not in the first step, "
                    "so that ddp no longer sends it from rank 0; set "
                    "strategy.ddp.broadcast_buffers = 'always'"
                )

    def _place(
        self, name: str, tensor: torch.Tensor
    ) -> tuple[str, dict[str, Any], str, torch.Tensor, int]:
        """Note where a buffer is held, so that no later step walks through all modules."""
        path, _, key = name.rpartition(".")
        return name, self.model.module.get_submodule(path)._buffers, key, tensor, tensor._version
