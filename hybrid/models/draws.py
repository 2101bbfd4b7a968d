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

from .dropout import Dropout, Seeds, draw_kept, find_rows, rows_in_use

PLACE, HOOKS = "_place_of_draws", "_hooks_of_draws"  # attributes of modules
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
    _begin(module, ())
    this = _passes.get()[-1]
    try:
        yield this
    finally:
        _leave(module)


def _begin(module: nn.Module, args: Any) -> None:
    if not module.training:
        return
    this, outer = _Pass(module), _passes.get()
    if not outer:
        this.mode = _SeededFunctions()
        this.mode.__enter__()
    _passes.set((*outer, this))


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
        stop_watching(module)


def stop_watching(module: nn.Module) -> None:
    """Removes the hooks of a module that draws nothing by functions."""
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


def _next_draw() -> tuple[int, int] | None:
    """Returns the place of the module in whose pass this is, and the draw's number there."""
    passes = _passes.get()
    if not passes:
        return None
    this = passes[-1]
    this.draws += 1
    return this.module.__dict__.get(PLACE, 0), this.draws - 1


def _kept(x: torch.Tensor, shape: Sequence[int], p: float, folded: bool) -> torch.Tensor | None:
    """Draws what is kept of a tensor, in its dtype; None where it has no rows that are samples.

    shape: of the numbers, whose first axes are the tensor's. folded: its rows are on the first axis
    in any case."""
    draw, seeds = _next_draw(), rows_in_use()
    if draw is None or not seeds:
        return None
    axis: int | None = find_rows(x, len(seeds))
    if folded:
        axis = 0 if x.shape[0] % len(seeds) == 0 else None
    if axis is None:
        return None
    return draw_kept(torch.Size(shape), axis, x.device, seeds, 1.0 - p, *draw, 1)


def _write(x: torch.Tensor, out: torch.Tensor, inplace: bool) -> torch.Tensor:
    return x.copy_(out) if inplace else out


def _dropout(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Drops single elements."""
    return _drop(func, input, p, training, inplace, input.shape)


def _drop(
    func: Any,
    x: torch.Tensor,
    p: float,
    training: bool,
    inplace: bool,
    shape: Sequence[int],
    folded: bool = False,
) -> torch.Tensor:
    given = (x, p, training) if func in _WITHOUT_INPLACE else (x, p, training, inplace)
    if not training or not 0 < p <= 1:
        return func(*given)
    kept = _kept(x, shape, p, folded)
    if kept is None:
        return func(*given)
    keep = 1.0 - p
    return _write(x, x * (kept / keep if keep else kept).to(x.dtype), inplace)


def _dropout_by_name(name: str, dims: int | None = None) -> Callable[..., Any]:
    """Makes the seeded function for one that drops whole channels, or writes in place.

    dims: of an input without an axis of samples, which torch's own function takes."""

    def seeded(
        func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, **o: Any
    ) -> Any:
        training, inplace = o.get("train", training), inplace or name.endswith("_")
        if dims == input.dim() or input.dim() < 2:
            return func(input, p, training) if func in _WITHOUT_INPLACE else func(
                input, p, training, inplace
            )
        whole = name.startswith("dropout")
        channels = input.shape if whole else (*input.shape[:2], *[1] * (input.dim() - 2))
        return _drop(func, input, p, training, inplace, channels)

    return seeded


def _alpha(feature: bool) -> Callable[..., Any]:
    """Makes the seeded function for alpha dropout, of elements or of whole channels."""

    def seeded(
        func: Any, input: Any, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Any:
        if not training or not 0 < p < 1:
            return func(input, p, training, inplace)
        shape = (*input.shape[:2], *[1] * (input.dim() - 2)) if feature else input.shape
        kept = _kept(input, shape, p, False) if input.dim() > 1 or not feature else None
        if kept is None:
            return func(input, p, training, inplace)
        real = kept.clone().masked_fill_((kept != 0) & (kept != 1), 1)  # padding is kept
        scale = 1.0 / math.sqrt((ALPHA * ALPHA * p + 1) * (1 - p))
        shift = (real - 1) * (ALPHA * scale) + ALPHA * scale * p
        out = input * (real * scale).to(input.dtype) + shift.to(input.dtype)
        return _write(input, out, inplace)

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
    weights = _attention_weights(query, key, attn_mask, is_causal, scale)
    return (weights * (kept / (1.0 - dropout_p)).to(weights.dtype)) @ value


def _attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Returns softmax(QK'), [..., queries, keys]; zeros for a query that no key is open to."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        size = scores.shape[-2:]
        mask = torch.ones(size, dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    else:
        scores = scores + mask
    closed = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(closed, 0.0).softmax(-1).masked_fill(closed, 0.0)


def _multi_head_attention(func: Any, *args: Any, **options: Any) -> Any:
    """Runs torch's function with seeded ones in place of those that it calls.

    No mode is in force inside a function that one takes over."""
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def drop(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return _drop(dropout, x, p, training, inplace, x.shape, folded=True)

    def attend(*given: Any, **more: Any) -> Any:
        return _attention(attention, *given, **more)

    F.dropout, F.scaled_dot_product_attention = drop, attend  # type: ignore[assignment]
    try:
        return func(*args, **options)
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention  # type: ignore[assignment]


_SEEDED: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    F.dropout1d: _dropout_by_name("channels", dims=2),
    F.dropout2d: _dropout_by_name("channels"),
    F.dropout3d: _dropout_by_name("channels", dims=4),
    torch.dropout: _dropout_by_name("dropout"),
    torch.dropout_: _dropout_by_name("dropout_"),
    torch.feature_dropout: _dropout_by_name("channels"),
    torch.feature_dropout_: _dropout_by_name("channels_"),
    F.alpha_dropout: _alpha(feature=False),
    F.feature_alpha_dropout: _alpha(feature=True),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
_WITHOUT_INPLACE = {torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_}
