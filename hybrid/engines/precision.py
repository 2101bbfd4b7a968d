"""What `train.precision` means under every strategy, and what a live run really holds: the ledger.

| | fp32 | bf16, fp16 |
|---|---|---|
| computing: parameters, activations between layers | fp32 | bf16, fp16 |
| gradients summed over micro-batches | fp32 | fp32 |
| gradients reduced over ranks | fp32 | fp32 |
| master weights, which the optimizer steps | fp32 | fp32, from the same fp32 start |
| optimizer state | fp32 | fp32 |
| buffers, such as rotary tables | their own | their own |
| loss | fp32 | fp32 |

fp16 also scales the loss: 2**16 at first, halved when a gradient overflows (that step is skipped),
doubled after 2,000 steps without (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

The two engines differ in where the rounded parameters live, and the ledger shows it: DeepSpeed
stores them beside its fp32 master weights; plain torch, DDP and FSDP2 store fp32 alone and round at
use. Left to themselves the engines differ more: DeepSpeed would start its master weights from
rounded ones, and sum and reduce gradients in bf16; Accelerate would run autocast, operator by
operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..models.layers import Layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL_SCALE, GROWTH_STEPS = 2.0**16, 2000
DEEPSPEED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {
        "fp16": {
            "enabled": True,
            "initial_scale_power": 16,
            "loss_scale_window": GROWTH_STEPS,
            "hysteresis": 1,
            "min_loss_scale": 1,
        }
    },
}


class _Round(nn.Module):
    """A parameter as its layers see it: rounded, with gradients that flow to the fp32 one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.to(self.dtype)


def round_at_use(model: nn.Module, dtype: torch.dtype) -> None:
    """Have the model's modules compute with their parameters rounded to `dtype`; the fp32 ones stay
    the model's parameters, and take the gradients."""
    if dtype == torch.float32:
        return
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point():
                parametrize.register_parametrization(module, name, _Round(dtype), unsafe=True)


def plain_name(name: str) -> str:
    """The name of a parameter without what `round_at_use` adds to it."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def round_inputs(layers: Layers, dtype: torch.dtype) -> None:
    """Have every layer take its floating inputs in `dtype`, as FSDP2 does by itself."""
    if dtype == torch.float32:
        return

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in args
        )

    for block in layers.blocks():
        block.register_forward_pre_hook(cast)


def deepspeed_keys(precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration keys for the meaning above."""
    if precision == "fp32":
        return {}
    wide = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return DEEPSPEED[precision] | wide


class Observer:
    """Notes the dtypes that a model really computes in, during one training step."""

    def __init__(self, layers: Layers) -> None:
        self.computing: set[str] = set()
        self.activations: set[str] = set()
        self._handles = []
        for layer in layers.blocks():
            self._handles.append(layer.register_forward_hook(self._note_output))
            for module in layer.modules():
                names = [n for n, p in module.named_parameters(recurse=False) if floating(p)]
                if names:
                    self._handles.append(module.register_forward_hook(self._reader(names)))

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else [output]
        self.activations |= {name_of(t.dtype) for t in outputs if floating(t)}

    def _reader(self, names: list[str]) -> Any:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            self.computing |= {name_of(getattr(module, name).dtype) for name in names}

        return read

    def stop(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def floating(value: Any) -> bool:
    """Whether a value is a tensor of floating-point numbers."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def name_of(dtype: torch.dtype) -> str:
    """fp32 for torch.float32, and so on; torch's own name for a type that has none here."""
    known = {d: name for name, d in DTYPES.items()}
    return known.get(dtype, str(dtype).removeprefix("torch."))


def names_of(tensors: Iterable[torch.Tensor]) -> str:
    """The dtypes of floating tensors as one word: fp32, or bf16+fp32 where they are mixed."""
    return "+".join(sorted({name_of(t.dtype) for t in tensors if floating(t)})) or "none"


def state_dtypes(optimizer: torch.optim.Optimizer) -> str:
    """The dtypes of a live optimizer's state; its step counters left out."""
    states = (t for state in optimizer.state.values() for t in state.values())
    return names_of(t for t in states if floating(t) and t.dim() > 0)


class Stepped(NamedTuple):
    """What updates a model: torch's optimizer, the master weights that it steps, and the dtype in
    which gradients are summed."""

    optimizer: torch.optim.Optimizer
    masters: list[torch.Tensor]
    gradients: str

    @classmethod
    def plain(cls, optimizer: torch.optim.Optimizer, gradients: str) -> Stepped:
        """An optimizer that steps the parameters it was given."""
        return cls(optimizer, [p for g in optimizer.param_groups for p in g["params"]], gradients)


def make_ledger(observer: Observer, model: nn.Module, stepped: Stepped) -> dict[str, str]:
    """What one rank holds and computes in, "none" where there is nothing of a kind."""
    return {
        "computing": "+".join(sorted(observer.computing)) or "none",
        "activations": "+".join(sorted(observer.activations)) or "none",
        "stored": names_of(model.parameters()),
        "gradients": stepped.gradients or "none",
        "master_weights": names_of(stepped.masters),
        "optimizer_state": state_dtypes(stepped.optimizer),
        "buffers": names_of(model.buffers()),
    }


def check_ledger(precision: str, buffers: str, ledger: Mapping[str, str]) -> dict[str, bool]:
    """Conditions that a ledger must meet; `buffers`: their dtypes before an engine took them."""
    wanted = {
        "computing": precision,
        "activations": precision,
        "gradients": "fp32",
        "master_weights": "fp32",
        "optimizer_state": "fp32",
        "buffers": buffers,
    }
    return {
        f"{row.replace('_', ' ')} in {dtype}": ledger[row] in (dtype, "none")
        for row, dtype in wanted.items()
    }
