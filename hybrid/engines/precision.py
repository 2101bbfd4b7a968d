"""This module says what `train.precision` means, and what a live run really holds: its ledger.

| | fp32 | bf16, fp16 |
|---|---|---|
| computing: parameters, activations between layers | fp32 | bf16, fp16 |
| gradients summed over micro-batches | fp32 | fp32 |
| gradients reduced over ranks | fp32 | fp32 |
| master weights, which the optimizer steps | fp32 | fp32, from the same fp32 start |
| optimizer state | fp32 | fp32 |
| buffers, such as rotary tables | their own | their own |
| multiplying fp32 tensors | fp32, not TF32 | fp32, not TF32 |
| loss | fp32 | fp32 |

This is the same under every strategy. fp16 also scales the loss: by 2**16 at first, by half of that
after a gradient overflowed (that step is skipped), and by twice as much after 2,000 steps without
an overflow (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

The engines keep the rounded parameters in different places, and the ledger shows it: DeepSpeed
stores them beside its fp32 master weights; plain torch, DDP and FSDP2 store fp32 alone and round at
use. With their own defaults the engines would differ more: DeepSpeed would start its master weights
from rounded ones, and sum and reduce gradients in bf16; Accelerate would run autocast, operator by
operator."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from ..models.layers import Layers
from .compiled import watch_output, watch_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXACT = ("none", "ieee")  # values of `fp32_precision` in torch.backends that round to fp32
_BACKENDS: Any = torch.backends  # torch's annotations lack some of these
_PRODUCTS = {
    "cudnn.conv": _BACKENDS.cudnn.conv,
    "cudnn.rnn": _BACKENDS.cudnn.rnn,
    "cuda.matmul": _BACKENDS.cuda.matmul,
    "mkldnn.matmul": _BACKENDS.mkldnn.matmul,
    "mkldnn.conv": _BACKENDS.mkldnn.conv,
    "mkldnn.rnn": _BACKENDS.mkldnn.rnn,
}
_BY_DEFAULT = ("cudnn.conv", "cudnn.rnn")  # torch itself allows TF32 for these
INITIAL_SCALE, GROWTH_STEPS = 2.0**16, 2000


class _Round(nn.Module):
    """Rounds a parameter for its layer; gradients flow back to the fp32 parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.to(self.dtype)


def forbid_tf32() -> list[str]:
    """Have products, convolutions and recurrent layers of fp32 tensors round to fp32, everywhere.

    torch lets cuDNN round convolutions' inputs to the 10 bits of TF32 unless it is told otherwise,
    and a call of `torch.set_float32_matmul_precision` does so for products, also on CPUs. Returns
    a warning where the job's own code had allowed that."""
    # torch raises at each read of its older setting where that says otherwise than the newer ones,
    # such as in `torch.backends.cudnn.flags` in a user's loss.
    torch.backends.cudnn.allow_tf32 = False
    allowed = [name for name, one in _PRODUCTS.items() if one.fp32_precision not in EXACT]
    if any(name.endswith("matmul") for name in allowed):
        torch.set_float32_matmul_precision("highest")
    for name in allowed:
        _PRODUCTS[name].fp32_precision = "ieee"
    own = [name for name in allowed if name not in _BY_DEFAULT]
    if not own:
        return []
    return [f"torch.backends.{own[0]}.fp32_precision has no effect: fp32 is fp32 here, or set bf16"]


def _fp32_products() -> str:
    found = {one.fp32_precision for one in _PRODUCTS.values()}
    return _join("fp32" if name in EXACT else name for name in found)


def round_at_use(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the model's modules compute with their parameters rounded to `dtype`.
    The fp32 ones stay the model's parameters, and take the gradients."""
    if dtype == torch.float32:
        return
    classes: dict[tuple[Any, ...], type[nn.Module]] = {}
    for module in list(model.modules()):
        kind = type(module)
        names = [n for n, p in module.named_parameters(recurse=False) if floating(p)]
        for name in names:
            parametrize.register_parametrization(module, name, _Round(dtype), unsafe=True)
        if names:
            # torch makes a class for each module. torch.compile compiles a block again for each
            # class that it meets in it, and after eight times it leaves further blocks uncompiled.
            module.__class__ = classes.setdefault((kind, *names), type(module))


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return the names of parameters that `round_at_use` moved, each with the one it had before.

    A user's own parametrizations keep their names."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], _Round):
            holder, _, parameter = name.rpartition("parametrizations.")
            found[f"{name}.original"] = holder + parameter
    return found


def round_inputs(layers: Layers, dtype: torch.dtype) -> None:
    """Make every layer take its floating-point inputs in `dtype`, as FSDP2 does by itself.

    That is all of them: masks and what a dict holds too, by position or by keyword."""
    if dtype == torch.float32:
        return
    layers.input_dtype = dtype

    def round_one(value: Any) -> Any:
        return value.to(dtype) if floating(value) else value

    def cast(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return tree_map(round_one, (args, options))

    for block in layers.blocks():
        block.register_forward_pre_hook(cast, with_kwargs=True)


def deepspeed_keys(precision: str) -> dict[str, Any]:
    """Return the keys of DeepSpeed's configuration that give a precision the meaning above."""
    if precision == "fp32":
        return {}
    scaling = {
        "initial_scale_power": 16,
        "loss_scale_window": GROWTH_STEPS,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }
    return {
        precision: {"enabled": True} | (scaling if precision == "fp16" else {}),
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


class Observer:
    """Notes the dtypes that a model really computes in, during one training step."""

    def __init__(self, layers: Layers, compiled: bool) -> None:
        """Begin to watch layers that `prepare_layers` has prepared. compiled: and compiled."""
        self.computing: set[str] = set()
        self.activations: set[str] = set()
        self._ends = [watch_output(layer, self._note_output) for layer in layers.blocks()]
        if compiled:
            self._ends.append(watch_parameters(self._note_parameter))
            return
        for layer in layers.blocks():
            for module in layer.modules():
                names = [n for n, p in module.named_parameters(recurse=False) if floating(p)]
                if names:
                    note = functools.partial(self._note_parameters, names)
                    self._ends.append(module.register_forward_hook(note).remove)

    def _note_output(self, output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else [output]
        self.activations |= {name_of(t.dtype) for t in outputs if floating(t)}

    def _note_parameter(self, dtype: torch.dtype) -> None:
        self.computing.add(name_of(dtype))

    def _note_parameters(self, names: list[str], module: nn.Module, args: Any, output: Any) -> None:
        self.computing |= {name_of(getattr(module, name).dtype) for name in names}

    def stop(self) -> None:
        """Watch no longer."""
        while self._ends:
            self._ends.pop()()


def floating(value: Any) -> bool:
    """Return whether a value is a tensor of floating-point numbers."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def name_of(dtype: torch.dtype) -> str:
    """Return fp32 for torch.float32, and so on; torch's own name for a type not in `DTYPES`."""
    known = {d: name for name, d in DTYPES.items()}
    return known.get(dtype, str(dtype).removeprefix("torch."))


def names_of(tensors: Iterable[torch.Tensor]) -> str:
    """Return the dtypes of floating-point tensors as one word, such as fp32 or bf16+fp32."""
    return _join(name_of(t.dtype) for t in tensors if floating(t))


def _join(names: Iterable[str]) -> str:
    return "+".join(sorted(set(names))) or "none"


def state_dtypes(optimizer: torch.optim.Optimizer) -> str:
    """Return the dtypes of a live optimizer's state, without its step counters."""
    states = tree_leaves(dict(optimizer.state))  # one of a user's own may nest what it keeps
    return names_of(t for t in states if floating(t) and t.dim() > 0)


class Stepped(NamedTuple):
    """Holds what updates a model."""

    optimizer: torch.optim.Optimizer
    masters: list[torch.Tensor]  # which the optimizer steps
    gradients: str  # the dtype in which they are summed

    @classmethod
    def plain(cls, optimizer: torch.optim.Optimizer, gradients: str) -> Stepped:
        """Describe an optimizer that steps the parameters it was given."""
        return cls(optimizer, [p for g in optimizer.param_groups for p in g["params"]], gradients)


def make_ledger(observer: Observer, model: nn.Module, stepped: Stepped) -> dict[str, str]:
    """Return what one rank holds and computes in, by row; "none" if it has nothing of a kind."""
    return {
        "computing": _join(observer.computing),
        "activations": _join(observer.activations),
        "stored": names_of(model.parameters()),
        "gradients": stepped.gradients or "none",
        "master_weights": names_of(stepped.masters),
        "optimizer_state": state_dtypes(stepped.optimizer),
        "buffers": names_of(model.buffers()),
        "fp32_products": _fp32_products(),
    }


def check_ledger(precision: str, buffers: str, ledger: Mapping[str, str]) -> dict[str, bool]:
    """Return the conditions on a ledger, each with whether it holds.
    `buffers`: the dtypes of the buffers before an engine took the model."""
    wanted = {
        "computing": precision,
        "activations": precision,
        "gradients": "fp32",
        "master_weights": "fp32",
        "optimizer_state": "fp32",
        "buffers": buffers,
        "fp32_products": "fp32",
    }
    return {
        f"{row.replace('_', ' ')} in {dtype}": ledger[row] in (dtype, "none")
        for row, dtype in wanted.items()
    }
