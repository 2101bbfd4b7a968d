"""This module cuts a model for ZeRO-3 parameter by parameter, before DeepSpeed takes it.

DeepSpeed would first move the model to the device, round it, and send it whole from rank 0, so that
each rank held all of it for a moment, and a model larger than its device could not start (0.19.8,
`_configure_distributed_model`). It leaves a model alone that `deepspeed.zero.Init` has cut:
https://deepspeed.readthedocs.io/en/stable/zero3.html#constructing-massive-models."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..models.layers import Layers
from .frozen import FrozenParts


def partition(
    model: nn.Module,
    keep: Callable[[torch.Tensor], None],
    layers: Layers,
    frozen: FrozenParts | None,
    init: Any,
    config: dict[str, Any],
    device: torch.device,
) -> None:
    """Move, round, send from rank 0 and cut each parameter, one after another; collective.

    One without a value gets its first one then, which `keep` and `frozen` are told of. init: the
    class `deepspeed.zero.Init`. config: DeepSpeed's, complete. Buffers stay whole, on the device.
    """
    late = {p for p in model.parameters() if p.is_meta}

    class OneByOne(init):
        def _convert_to_zero_parameters(self, param_list: Iterable[torch.Tensor]) -> None:
            for param in param_list:
                if param in late:
                    layers.fill_parameters([param])
                    keep(param)
                    if frozen:
                        frozen.keep(param)
                super()._convert_to_zero_parameters([param])

        def _zero_init_param(self, param: torch.Tensor) -> None:
            if param.is_floating_point():
                param.data = param.data.to(self.dtype)
            super()._zero_init_param(param)

    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    OneByOne(module=model, config_dict_or_path=config)
