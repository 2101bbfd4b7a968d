"""This module tries out a causal language model of transformers: how to cut it, and its causality.

It knows no family by name. What `hybrid.models.cutting.trial` does with samples of the data, it
does with ten token ids, so that it needs no data, and also on the meta device, without values. It
also changes a token: in a causal model, earlier logits stay."""

import contextlib
import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ..cutting.blocks import candidates, record_calls
from ..cutting.pieces import Pieces, find_unused
from ..cutting.plan import CutPlan
from ..cutting.running import make_twin, run_seeded, same, words
from ..cutting.trial import NO_LIST

ROWS, TOKENS = 2, 5


class NotOnMeta(Exception):
    """Says that the model must be built with real tensors, outside the meta device."""


def probe(model: nn.Module, vocab_size: int, pad_token: int | None) -> CutPlan:
    """Finds how to cut `model`, which stays as it was; its parameters may be on the meta device.

    Raises ValueError where it is not causal (not checked on meta), and NotOnMeta where it is on
    meta and its forward pass needs values."""
    known = [i for i in range(vocab_size) if i != pad_token]
    picked = [known[i % len(known)] for i in range(ROWS * TOKENS)]
    on_meta = any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    fake = FakeTensorMode(allow_non_fake_inputs=True) if on_meta else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), fake, torch.device("cpu"), torch.enable_grad():
        ids = torch.tensor(picked).reshape(ROWS, TOKENS)
        twin = _twin(model)
        calls = record_calls(twin)
        try:
            logits = _run(twin, ids)
        except Exception as error:  # a family's own code may raise anything
            if on_meta:
                raise NotOnMeta(words(error)) from error
            return CutPlan(f"a trial with {ROWS} x {TOKENS} token ids failed: {words(error)}")
        if not on_meta:
            _check_causal(_twin(model), ids, logits)
        for names in candidates(model, calls, chains=False):
            pieces = Pieces(_twin(model), names, find_unused(twin, names, logits))
            plan = pieces.cut(lambda twin: _run(twin, ids), logits, values=False)
            if not (on_meta or plan.problem or same(pieces.ends[-1], logits)):
                plan.problem = "its blocks hand on more than a hidden state"
            return plan
        return CutPlan(NO_LIST)


def _run(twin: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return run_seeded(lambda twin: twin(input_ids=ids).logits, twin)


def _twin(model: nn.Module) -> nn.Module:
    """Copies the model as `make_twin` does; tensors on meta become fake ones.

    These have no values either, but transformers knows not to look at them
    (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html)."""
    if not any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
        return make_twin(model)
    shared: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            trained = isinstance(tensor, nn.Parameter)
            shared[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
        elif isinstance(tensor, nn.Parameter):
            shared[id(tensor)] = tensor
    with unset_fake_temporarily():  # buffers may have values, which a fake copy would lose
        twin: Any = copy.deepcopy(model, shared).train()
    if any(t.is_meta for t in model.parameters()):
        with contextlib.suppress(ValueError):  # a model without experts to choose
            twin.set_experts_implementation("batched_mm")  # what the others run follows the routing
    return twin


def _check_causal(twin: nn.Module, ids: torch.Tensor, logits: torch.Tensor) -> None:
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    change = (_run(twin, changed) - logits).detach().abs()
    if change[:, :-1].max() > 1e-3 * change[:, -1].max():
        raise ValueError(
            "it is not causal: another last token changes earlier logits "
            "(some encoders are causal with overrides = { is_decoder = true })"
        )
