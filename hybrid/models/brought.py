"""This module makes layers of whatever a model function returns: layers, a chain, or a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .cutting.blocks import is_chain, is_list
from .cutting.calling import OWN_LOSS, PLAIN
from .cutting.layers import ModuleLayers
from .layers import Layers
from .own_loss import CUT_PROBLEM

# The functions that may stand in a list of layers, each for the module that torch has for it.
MODULES: dict[Callable[..., Any], type[nn.Module]] = {
    torch.flatten: nn.Flatten,
    torch.relu: nn.ReLU,
    torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh,
    functional.elu: nn.ELU,
    functional.gelu: nn.GELU,
    functional.hardswish: nn.Hardswish,
    functional.leaky_relu: nn.LeakyReLU,
    functional.logsigmoid: nn.LogSigmoid,
    functional.mish: nn.Mish,
    functional.relu: nn.ReLU,
    functional.relu6: nn.ReLU6,
    functional.selu: nn.SELU,
    functional.sigmoid: nn.Sigmoid,
    functional.silu: nn.SiLU,
    functional.softplus: nn.Softplus,
    functional.softsign: nn.Softsign,
    functional.tanh: nn.Tanh,
}
VALID = "(layers, loss), (module, loss), or a module that returns its own loss"


def split_built(built: Any) -> tuple[Any, Any]:
    """Returns the model and the loss that a model function returned; None is no loss.

    Raises ValueError where it returned something else."""
    if isinstance(built, nn.Module) and not isinstance(built, nn.ModuleList):
        return built, None
    if not isinstance(built, tuple) or len(built) != 2:
        what = f"a tuple of {len(built)}" if isinstance(built, tuple) else _kind(built)
        raise ValueError(f"must return {VALID}; it returned {what}")
    model, loss = built
    listed = isinstance(model, (list, tuple, nn.ModuleList))
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ValueError(f"returned the class {model.__name__}: make a module of it")
    if not listed and not isinstance(model, nn.Module):
        raise ValueError(f"must return {VALID}; it returned {_kind(model)} for a module")
    if listed and loss is None:
        raise ValueError("a list of layers needs a loss: return (layers, loss)")
    return model, loss


def as_layers(model: Any, own_loss: bool = False) -> Layers:
    """Makes layers of a list of layers, an `nn.Sequential` or any other module.

    An `nn.Sequential` without further ones in it is a list of layers with names of their own.
    own_loss: the module returns its loss, so that its output is kept as it is, and it cannot be
    cut. Raises ValueError where a layer is none."""
    if isinstance(model, Layers):
        return model
    if own_loss:
        layers = ModuleLayers(model, OWN_LOSS)
        layers.cut_problem = CUT_PROBLEM
        return layers
    if is_chain(model) and not any(is_list(child) for child in model):
        return Layers(model, list(model._modules))
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
        return ModuleLayers(model, PLAIN)
    return Layers([_as_layer(i, layer) for i, layer in enumerate(model)])


def _as_layer(i: int, layer: Any) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    known = MODULES.get(layer) if callable(layer) and not isinstance(layer, type) else None
    if known:
        return known()
    if isinstance(layer, type) and issubclass(layer, nn.Module):
        raise ValueError(f"layer {i} is the class {layer.__name__}: make a module of it")
    if callable(layer):
        names = ", ".join(sorted({f.__name__ for f in MODULES}))
        raise ValueError(
            f"layer {i} is the function {getattr(layer, '__name__', layer)}; valid: an nn.Module "
            f"(such as nn.Flatten() for one that flattens), or one of torch's own: {names}"
        )
    raise ValueError(f"layer {i} is {_kind(layer)}, each layer must be an nn.Module")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
