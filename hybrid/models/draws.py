"""This module makes dropout by torch's functions draw by sample and place, as `dropout` does.

`F.dropout` in a forward pass, its relatives, and the dropout of attention (of torch's
`scaled_dot_product_attention` and `MultiheadAttention`, and so of transformers' models) draw from
one random stream per process. Here each call draws from its rows' seeds, its module's place in the
model, and its number among the calls in one forward pass of that module. So every strategy drops
the same, a stage of a pipeline too.

Hooks watch each module in its first training pass, and stay on those that draw. All others run as
they would without this. Attention that drops is computed by its formula, since the fused kernels of
torch draw by themselves."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from .attention import attention_weights
from .dropout import Dropout, draw_kept, find_rows, rows_in_use

# Attributes of modules: the place in the model, the hooks' ids, that the pass before drew nothing.
PLACE, HOOKS, UNUSED = "_place_of_draws", "_hooks_of_draws", "_draws_nothing"
TOKENS_FIRST = "_draws_with_tokens_first"  # and the numbers of draws whose rows are on axis 1
ALPHA = 1.7580993408473766  # of SELU, by which alpha dropout keeps mean and variance


@dataclasses.dataclass
class _Pass:
    """Is one forward pass of a module that is under way, and counts what it drew."""

    module: nn.Module
    draws: int = 0
    mode: TorchFunctionMode | None = None


_passes: ContextVar[tuple[_Pass, ...]] = ContextVar("passes", default=())


def seed_functions(modules: Sequence[nn.Module]) -> None:
    """Makes the modules of a whole model draw by sample and place where they call a function.

    Call it on the whole model before that is cut, since places are counted through all of it."""
    for place, module in enumerate(modules):
        module.__dict__[PLACE] = place
        plain = type(module).__module__.startswith("torch.nn.") and not any(module.children())
        if (plain and not isinstance(module, _DropoutNd)) or isinstance(module, Dropout):
            continue
        before = module.register_forward_pre_hook(_begin, prepend=True)
        after = module.register_forward_hook(_end, always_call=True)
        module.__dict__[HOOKS] = before.id, after.id


@contextlib.contextmanager
def forward_pass(module: nn.Module) -> Iterator[_Pass]:
    """Counts what a module draws by functions while the context lasts, which is one pass of it."""
    this = _enter(module)
    try:
        yield this
    finally:
        _leave(module)


def _begin(module: nn.Module, args: Any) -> None:
    if not module.training:
        return
    if module.__dict__.pop(UNUSED, False):
        _stop_watching(module)
        return
    _enter(module)


def _enter(module: nn.Module) -> _Pass:
    this, outer = _Pass(module), _passes.get()
    if not outer:
        this.mode = _SeededFunctions()
        this.mode.__enter__()
    _passes.set((*outer, this))
    return this


def _leave(module: nn.Module) -> _Pass | None:
    """Ends the pass of a module, and those inside it that an exception left."""
    passes = _passes.get()
    places = [i for i, one in enumerate(passes) if one.module is module]
    if not places:
        return None
    this = passes[places[-1]]
    _passes.set(passes[: places[-1]])
    if this.mode is not None:
        this.mode.__exit__(None, None, None)
    return this


def _end(module: nn.Module, args: Any, output: Any) -> None:
    this = _leave(module)
    if this is not None and not this.draws:
        # Not here: where an exception leaves the pass, torch goes through the live hooks.
        module.__dict__[UNUSED] = True


def is_placed(module: nn.Module) -> bool:
    """Tells whether `seed_functions` took a module in."""
    return PLACE in module.__dict__


def draws_by_functions(module: nn.Module) -> bool:
    """Tells whether a module that has made a training pass drew by functions in it."""
    return HOOKS in module.__dict__ and UNUSED not in module.__dict__


def _stop_watching(module: nn.Module) -> None:
    before, after = module.__dict__.pop(HOOKS, (None, None))
    module._forward_pre_hooks.pop(before, None)
    module._forward_hooks.pop(after, None)
    module._forward_hooks_always_called.pop(after, None)


class _SeededFunctions(TorchFunctionMode):
    """Is in force while a module that may draw runs."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        seeded = _SEEDED.get(func)
        if seeded is None:
            return func(*args, **(kwargs or {}))
        return seeded(func, *args, **(kwargs or {}))


def _kept(x: torch.Tensor, shape: Sequence[int], p: float, folded: bool) -> torch.Tensor | None:
    """Draws 1 for what is kept of a tensor, 0 for the rest; None where it has no rows.

    shape: of the numbers, whose first axes are the tensor's. folded: its rows are on the first axis
    in any case."""
    passes, seeds = _passes.get(), rows_in_use()
    if not passes:
        return None
    this = passes[-1]
    this.draws += 1
    if not seeds:
        return None
    attributes = this.module.__dict__
    tokens_first = attributes.setdefault(TOKENS_FIRST, set())
    axis = find_rows(x, len(seeds), folded, this.draws in tokens_first)
    if axis is None:
        return None
    if axis == 1:
        tokens_first.add(this.draws)
    place = attributes.get(PLACE, 0), this.draws, 1
    return draw_kept(torch.Size(shape), axis, x.device, seeds, 1.0 - p, *place)


def _multiply(
    x: torch.Tensor, shape: Sequence[int], p: float, inplace: bool, folded: bool = False
) -> torch.Tensor | None:
    """Drops what `_kept` does not keep of a tensor; None where it has no rows."""
    kept = _kept(x, shape, p, folded)
    if kept is None:
        return None
    out = x * (kept / (1.0 - p) if p < 1 else kept).to(x.dtype)
    return x.copy_(out) if inplace else out


def _channels(x: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of one number for each channel of each sample."""
    return (*x.shape[:2], *[1] * (x.dim() - 2))


def _elements(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    out = _multiply(input, input.shape, p, inplace) if training and 0 < p <= 1 else None
    return func(input, p, training, inplace) if out is None else out


def _whole_channels(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    # torch takes these numbers of axes for a single sample.
    alone = {F.dropout1d: 2, F.dropout3d: 4}.get(func, 1) == input.dim()
    draws = training and 0 < p <= 1 and not alone
    out = _multiply(input, _channels(input), p, inplace) if draws else None
    return func(input, p, training, inplace) if out is None else out


def _native(of_channels: bool, inplace: bool) -> Callable[..., Any]:
    """Makes the seeded function for an operator of torch behind the functions."""

    def seeded(func: Any, input: Any, p: float, train: bool) -> Any:
        draws = train and 0 < p <= 1 and input.dim() > int(of_channels)
        shape = _channels(input) if of_channels else input.shape
        out = _multiply(input, shape, p, inplace) if draws else None
        return func(input, p, train) if out is None else out

    return seeded


def _alpha(of_channels: bool) -> Callable[..., Any]:
    """Makes the seeded function for alpha dropout, of elements or of whole channels."""

    def seeded(
        func: Any, input: Any, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Any:
        draws = training and 0 < p < 1 and input.dim() > int(of_channels)
        shape = _channels(input) if of_channels else input.shape
        kept = _kept(input, shape, p, False) if draws else None
        if kept is None:
            return func(input, p, training, inplace)
        scale = 1.0 / math.sqrt((ALPHA * ALPHA * p + 1) * (1 - p))
        shift = (kept - 1) * (ALPHA * scale) + ALPHA * scale * p
        out = input * (kept * scale).to(input.dtype) + shift.to(input.dtype)
        return input.copy_(out) if inplace else out

    return seeded


def _attention(
    func: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Computes attention whose weights are dropped."""
    more = {"scale": scale, "enable_gqa": enable_gqa}
    shape = (*query.shape[:-1], key.shape[-2])
    kept = _kept(query, shape, dropout_p, True) if 0 < dropout_p < 1 else None
    if kept is None:
        return func(query, key, value, attn_mask, dropout_p, is_causal, **more)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    weights = attention_weights(query, key, attn_mask, is_causal, scale)
    return (weights * (kept / (1.0 - dropout_p)).to(weights.dtype)) @ value


def _multi_head_attention(func: Any, *args: Any, **options: Any) -> Any:
    """Runs torch's function with seeded ones in place of those that it calls.

    No mode is in force inside a function that one takes over."""
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def drop(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        draws = training and 0 < p <= 1
        out = _multiply(x, x.shape, p, inplace, folded=True) if draws else None
        return dropout(x, p, training, inplace) if out is None else out

    def attend(*given: Any, **more: Any) -> Any:
        return _attention(attention, *given, **more)

    F.dropout, F.scaled_dot_product_attention = drop, attend  # type: ignore[assignment]
    try:
        return func(*args, **options)
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention


_SEEDED: dict[Any, Callable[..., Any]] = {
    F.dropout: _elements,
    F.dropout1d: _whole_channels,
    F.dropout2d: _whole_channels,
    F.dropout3d: _whole_channels,
    torch.dropout: _native(of_channels=False, inplace=False),
    torch.dropout_: _native(of_channels=False, inplace=True),
    torch.feature_dropout: _native(of_channels=True, inplace=False),
    torch.feature_dropout_: _native(of_channels=True, inplace=True),
    F.alpha_dropout: _alpha(of_channels=False),
    F.feature_alpha_dropout: _alpha(of_channels=True),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
