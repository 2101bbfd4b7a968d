"""Text from the final weights of a run: what a person looks at.

`hybrid generate RUN` calls `generate`. Each token costs one forward pass over the context; nothing
is kept between passes.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.weights import FILE, verify_weights
from ..data.text import CONTEXT
from ..data.text.tokenizers import BYTES, Tokenizer, load_tokenizer
from ..job.errors import JobError
from ..job.file import load_job
from ..job.schema import Job
from ..models import build_model
from .folder import CHECKPOINTS

FINAL = Path(CHECKPOINTS, "final")


def generate(
    run: Path,
    prompt: str = "",
    num_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    top_k: int | None = None,
) -> str:
    """The prompt and what the model of a run writes after it, up to `num_tokens` tokens; it stops
    where it ends the document.

    run: folder of one run, with job.json and checkpoints/final. The prompt is taken as a document's
    beginning. temperature: logits are divided by it; 0 takes the likeliest token each time. top_k:
    draw from so many likeliest tokens only. The same arguments give the same text on one machine.
    Raises JobError.
    """
    _check(num_tokens, temperature, seed, top_k)
    job = _load_job(run)
    tokenizer = _load_tokenizer(job)
    model = _load_model(run, job)
    _require_vocabulary(model, tokenizer.vocab_size)
    ids = [tokenizer.end, *tokenizer.encode(_utf8(prompt)).tolist()]
    context = job.data.options.get("context", CONTEXT)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        logits = _next_logits(model, ids[-context:], tokenizer.vocab_size)
        following = _choose(logits, temperature, top_k, draw)
        if following == tokenizer.end:
            break
        ids.append(following)
    return tokenizer.decode(ids[1:])


def _check(num_tokens: int, temperature: float, seed: int, top_k: int | None) -> None:
    if num_tokens < 1:
        raise JobError(f"tokens = {num_tokens}: valid: 1 or more")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise JobError(f"temperature = {temperature}: valid: 0 or more; 0 is greedy")
    if not 0 <= seed < 2**32:  # torch's CPU generator reads no more bits
        raise JobError(f"seed = {seed}: valid: 0 up to 2**32 - 1")
    if top_k is not None and top_k < 1:
        raise JobError(f"top_k = {top_k}: valid: 1 or more")


def _load_job(run: Path) -> Job:
    if not (run / "job.json").is_file():
        runs = sorted(p.parents[2] for p in run.glob(str(Path("*", FINAL, FILE))))
        below = f"; runs below it: {', '.join(map(str, runs))}" if runs else ""
        raise JobError(f"{run}: no run's folder, it has no job.json{below}")
    job = load_job(run / "job.json")
    if job.data.name != "text":
        raise JobError(f"{run}: data.name = {job.data.name!r}: only a run on 'text' writes text")
    return job


def _load_tokenizer(job: Job) -> Tokenizer:
    try:
        return load_tokenizer(job.data.options.get("tokenizer", BYTES))
    except ValueError as error:
        raise JobError(f"data.options.{error}") from None


def _load_model(run: Path, job: Job) -> nn.Module:
    """The model of the job with the run's final weights, not training, on a GPU if there is one."""
    from safetensors.torch import load_file

    file = verify_weights(run / FINAL)
    layers, _ = build_model(job)
    model = layers.whole()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = load_file(file)
    if missing := sorted(tensors.keys() - saved.keys()):
        raise JobError(f"{file}: has no {missing[0]}, which the model of job.json has")
    if extra := sorted(saved.keys() - tensors.keys()):
        raise JobError(f"{file}: has {extra[0]}, which the model of job.json has not")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != saved[name].shape:
                shapes = f"shape {list(saved[name].shape)}, the model's has {list(tensor.shape)}"
                raise JobError(f"{file}: {name} has {shapes}")
            tensor.copy_(saved[name])
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _utf8(prompt: str) -> bytes:
    try:
        return prompt.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no text
        raise JobError(f"prompt = {prompt!r}: is not UTF-8 text") from None


@torch.inference_mode()
def _require_vocabulary(model: nn.Module, size: int) -> None:
    """JobError unless the model gives logits of `size` tokens or more."""
    output = model(torch.zeros(1, 1, dtype=torch.int64, device=_device(model)))
    if not isinstance(output, torch.Tensor) or output.shape[:-1] != (1, 1):
        raise JobError("the model gives no logits of shape [batch, tokens, vocabulary]")
    if output.shape[-1] < size:
        raise JobError(f"the model has logits of {output.shape[-1]} tokens, the tokenizer {size}")


@torch.inference_mode()
def _next_logits(model: nn.Module, ids: list[int], vocab_size: int) -> torch.Tensor:
    """Logits [vocab_size], fp64 on the CPU, of the token after `ids`; a model may have more, for
    tokens that no text has."""
    output = model(torch.tensor([ids], device=_device(model)))
    last = output[0, -1, :vocab_size].double().cpu()
    if last.isnan().any():
        raise JobError("the weights give logits that are no numbers")
    return last


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _choose(
    logits: torch.Tensor, temperature: float, top_k: int | None, draw: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    k = len(logits) if top_k is None else min(top_k, len(logits))
    values, tokens = logits.topk(k)
    # the greatest is subtracted first: a small temperature would make logits infinite
    probabilities = ((values - values[0]) / temperature).softmax(-1)
    return int(tokens[torch.multinomial(probabilities, 1, generator=draw)])
