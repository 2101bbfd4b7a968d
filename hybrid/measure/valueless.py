"""This module runs a rank's code on tensors that have shapes and no values.

    with valueless():
        model = build()                 # takes no memory
        forget_buffers(model.modules())
        model(forget_values(batch)).sum().backward()

torch's `FakeTensorMode` makes such tensors; autograd, FSDP2, DDP and optimizers take them for real
ones. What has values keeps them: whole numbers, such as sample ids, and what is computed from real
tensors alone. A value that nobody has cannot be read; torch then raises `Unread`."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

Unread = (DataDependentOutputException, DynamicOutputShapeException)


class Valueless(FakeTensorMode):
    """Makes floating-point tensors without values, and leaves alone what is real.

    keeps_real: raises RuntimeError where a real floating-point tensor, such as a buffer, would get
    values that nobody has. Before the first step that is no harm: DDP sends rank 0's buffers."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.keeps_real = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        has_values = bool(tensors) or (dtype is not None and not dtype.is_floating_point)
        if has_values and not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **kwargs)
        if self.keeps_real:
            _refuse_writes(func, args)
        result: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.c10d.allreduce_.default:
            return result[0], _done(result[0])
        return result


def _refuse_writes(func: Any, args: Any) -> None:
    """Raise RuntimeError where a real floating-point tensor would get values that nobody has."""
    if not func._schema.is_mutable or func.namespace == "c10d":
        return
    for argument, value in itertools.zip_longest(func._schema.arguments, args):
        if argument is None or argument.alias_info is None or not argument.alias_info.is_write:
            continue
        for tensor in tree_leaves(value):
            real = isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor)
            if real and tensor.is_floating_point():
                raise RuntimeError(f"{func} would change a buffer by values that are not there")


def _done(tensors: Any) -> Any:
    """Return a collective that has ended, with these tensors.

    Those of torch's fake process group hold none, and DDP and its hooks read it from there."""
    future: Any = torch.futures.Future()
    future.set_result(tensors)
    c10d: Any = torch._C._distributed_c10d
    return c10d._create_work_from_future(future).boxed()


class _Apart:
    """Is a lock in torch's hands: DTensor finds shapes on whole tensors, which no rank ever has.

    It would make them in the mode that is active, where a meter counts them."""

    def __enter__(self) -> None:
        self._modes = _disable_current_modes()
        self._modes.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._modes.__exit__(*exception)


@contextlib.contextmanager
def valueless() -> Iterator[Valueless]:
    """Make floating-point tensors without values from here on."""
    move = nn.Module.to

    def move_nowhere(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # torch cannot swap such tensors, and all is on the CPU already.
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        return module if dtype is None else move(module, *args, **kwargs)

    with contextlib.ExitStack() as patched:
        for owner, name, value in (
            (nn.Module, "to", move_nowhere),
            # Accelerate finds the parameters of an optimizer again by their addresses.
            (FakeTensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata),
            (ShardingPropagator, "_fake_mode_lock", _Apart()),
        ):
            patched.enter_context(mock.patch.object(owner, name, value))
        yield patched.enter_context(Valueless())


def forget_values(value: Any) -> Any:
    """Return tensors in any nesting, the floating-point ones without values."""

    def forget(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or not one.is_floating_point():
            return one
        return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype)

    return tree_map(forget, value)


values = unset_fake_temporarily  # a context in which new tensors have values again


def forget_buffers(modules: Iterable[nn.Module]) -> None:
    """Give buffers without values zeros, since engines read the values of buffers.

    A step that changes one raises RuntimeError: what moves is sent, and that is not known here."""
    found = dict[int, torch.Tensor]()
    with values():
        for module in modules:
            for name, buffer in module._buffers.items():
                if isinstance(buffer, FakeTensor):
                    zeros = torch.zeros(buffer.shape, dtype=buffer.dtype)
                    module._buffers[name] = found.setdefault(id(buffer), zeros)
