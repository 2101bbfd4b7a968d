"""This module cuts a model for ZeRO-3 parameter by parameter, before DeepSpeed takes it.

DeepSpeed would first move the model to the device, round it, and send it whole from rank 0, so that
each rank held all of it for a moment, and a model larger than its device could not start (0.19.8,
`_configure_distributed_model`). It leaves a model alone that `deepspeed.zero.Init` has cut:
https://deepspeed.readthedocs.io/en/stable/zero3.html#constructing-massive-models."""

from typing import Any

import torch
from torch import nn


def partition(model: nn.Module, init: Any, config: dict[str, Any], device: torch.device) -> None:
    """Move, round, send from rank 0 and cut each parameter, one after another; collective.

    init: the class `deepspeed.zero.Init`. config: DeepSpeed's, complete. Buffers stay whole, on the
    device."""

    class OneByOne(init):
        def _zero_init_param(self, param: torch.Tensor) -> None:
            if param.is_floating_point():
                param.data = param.data.to(self.dtype)
            super()._zero_init_param(param)

    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    OneByOne(module=model, config_dict_or_path=config)
