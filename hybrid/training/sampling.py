"""Draws the tokens of a text one by one from the weights of a run.

Each token costs one forward pass over the whole context: keys and values are not cached between
passes."""

from typing import Any

import torch
from torch import nn

from ..checkpoint.pieces import WEIGHT, Piece
from ..data.text import CONTEXT, check_options
from ..data.text.tokenizers import BYTES, Tokenizer, load_tokenizer
from ..job.errors import JobError, tell_error
from ..job.schema import Job
from ..launch.failures import is_out_of_memory
from ..launch.placement import Placement
from ..models import build_model, made_whole
from ..models.starting import fill, match_names, require_fit
from ..models.vector_functions import call_vector_functions_once
from .saved import Saved


def sample(
    saved: Saved,
    prompt: str,
    num_tokens: int,
    temperature: float,
    seed: int,
    top_k: int | None,
) -> str:
    """Return the prompt and what the model writes after it; `generate` says what the others are."""
    call_vector_functions_once()
    tokenizer = _load_tokenizer(saved.job)
    model = _load_model(saved)
    _require_vocabulary(model, tokenizer.vocab_size)
    ids = [tokenizer.end, *tokenizer.encode(_utf8(prompt)).tolist()]
    context = saved.job.data.options.get("context") or CONTEXT
    draw = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        logits = _next_logits(model, ids[-context:], tokenizer.vocab_size)
        following = _choose(logits, temperature, top_k, draw)
        if following == tokenizer.end:
            break
        ids.append(following)
    return tokenizer.decode(ids[1:])


def _load_tokenizer(job: Job) -> Tokenizer:
    try:
        check_options(job.data.options)
        return load_tokenizer(job.data.options.get("tokenizer") or BYTES)
    except ValueError as error:
        raise JobError(f"data.options.{error}") from None


def _load_model(saved: Saved) -> nn.Module:
    """Make the job's model with the saved weights, in eval mode, on a GPU if there is one."""
    weights = saved.open()
    try:
        require_fit(saved.job, weights)
        layers = build_model(made_whole(saved.job))[0]
        tensors = layers.tensors()
        names = match_names(weights, layers)
        model = layers.whole()
        fill(weights, (Piece(n, WEIGHT, tuple(t.shape), t) for n, t in tensors.items()), names)
    finally:
        weights.close()
    asked = "cpu" if saved.job.launch.device == "cpu" else "auto"  # the run was elsewhere, perhaps
    return model.eval().to(Placement(device_asked=asked).device)


def _utf8(prompt: str) -> bytes:
    try:
        return prompt.encode()
    except UnicodeEncodeError:  # the command line held bytes that are no text
        raise JobError(f"prompt = {prompt!r}: is not UTF-8 text") from None


@torch.inference_mode()
def _require_vocabulary(model: nn.Module, size: int) -> None:
    """Raise JobError unless the model gives logits of `size` tokens or more."""
    output = _forward(model, [0])
    if not isinstance(output, torch.Tensor) or output.shape[:-1] != (1, 1):
        raise JobError("the model gives no logits of shape [batch, tokens, vocabulary]")
    if output.shape[-1] < size:
        raise JobError(f"the model has logits of {output.shape[-1]} tokens, the tokenizer {size}")


@torch.inference_mode()
def _next_logits(model: nn.Module, ids: list[int], vocab_size: int) -> torch.Tensor:
    """Return the logits of the token after `ids`: float64 [vocab_size] on the CPU.
    Further logits of the model are dropped: they are of tokens that no text has."""
    last = _forward(model, ids)[0, -1, :vocab_size].double().cpu()
    if last.isnan().any():
        raise JobError("the weights give logits that are no numbers")
    return last


def _forward(model: nn.Module, ids: list[int]) -> Any:
    given = torch.tensor([ids], device=next(model.parameters()).device)
    try:
        return model(given)
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        RuntimeError,
        AssertionError,
    ) as error:
        if is_out_of_memory(error) or isinstance(error, ModuleNotFoundError):
            raise
        words = f"the model cannot read {len(ids)} tokens: {tell_error(error)}"
        raise JobError(words) from error


def _choose(
    logits: torch.Tensor, temperature: float, top_k: int | None, draw: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    k = len(logits) if top_k is None else min(top_k, len(logits))
    values, tokens = logits.topk(k)
    # Subtract the greatest logit first: divided by a small temperature, logits overflow.
    probabilities = ((values - values[0]) / temperature).softmax(-1)
    return int(tokens[torch.multinomial(probabilities, 1, generator=draw)])
