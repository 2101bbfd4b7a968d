"""This module finds modules that draw what is not seeded by sample: no two layouts agree."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def find_own_draws(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[str]:
    """Names the modules that move torch's own random stream while `run` is called.

    These draw what is not seeded by sample, such as noise. Of modules inside one another the
    innermost is named. The model should be as engines have it (`engines.layers.prepare_layers`),
    and `run` a training pass under `use_rows`."""
    found, states = dict[str, None](), list[tuple[torch.Tensor, int]]()

    def before(module: nn.Module, args: Any) -> None:
        states.append((torch.get_rng_state(), len(found)))

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        state, known = states.pop()
        if len(found) == known and not torch.equal(state, torch.get_rng_state()):
            found[name] = None

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        ends = functools.partial(after, name)
        handles.append(module.register_forward_hook(ends, always_call=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(found)
