"""This module reads off a job what its model takes, and of how many layers it is. No torch here.

It knows the shipped families and data sets, by their options and defaults. Where an option is
missing or of another type it says nothing: the family itself refuses that, in its own words."""

import json
from pathlib import Path
from typing import Any

from ..job.errors import JobError
from ..job.schema import Job
from ..job.trust import HF
from .presets import BYTES, CONTEXT, PRESETS, SIZES

MLP_SIZES = (784, 512, 256, 10)
FEATURES, CLASSES = 784, 10  # of linear, random and mnist, where the job does not say them
TEXT_CONTEXT = 256
MAX_CONFIG_BYTES = 2**20


def count_layers(job: Job) -> int | None:
    """Return into how many layers the model can be cut at most; None where that is not known."""
    options = job.model.options
    if job.model.name == "linear":
        return 1
    if job.model.name == "mlp":
        sizes = options.get("sizes", MLP_SIZES)
        return len(sizes) - 1 if isinstance(sizes, (list, tuple)) and len(sizes) > 1 else None
    blocks = None
    if job.model.name == "gpt":
        blocks = _gpt_size(options, "num_layers")
    elif job.model.name.startswith(HF):
        blocks = _whole(_config(job).get("num_hidden_layers"))
    return blocks + 2 if blocks else None  # before them the embedding, behind them the head


def check_fit(job: Job) -> None:
    """Raise JobError where the model cannot take the samples that the data set gives."""
    model, data = job.model.name, job.data.name
    takes_ids = model == "gpt" or model.startswith(HF)
    if data in ("random", "mnist") and takes_ids:
        valid = "text, package.module:function"
        raise JobError(
            f"data.name = {data!r}: gives numbers, and model.name = {model!r} takes token ids; "
            f"valid: {valid}"
        )
    if data == "text" and model in ("linear", "mlp"):
        valid = "gpt, hf:NAME_OR_PATH, package.module:function"
        raise JobError(
            f"model.name = {model!r}: takes numbers, and data.name = 'text' gives token ids; "
            f"valid: {valid}"
        )
    if data in ("random", "mnist") and model in ("linear", "mlp"):
        _check_widths(job)
    if data == "text" and takes_ids:
        _check_tokens(job)


def _check_widths(job: Job) -> None:
    """Hold the first layer against the samples' numbers, and the last against their classes."""
    options, given = job.model.options, job.data.options if job.data.name == "random" else {}
    if job.model.name == "linear":
        first, last = "in_features", "out_features"
        width = _whole(options.get(first, FEATURES))
        outputs = _whole(options.get(last, CLASSES))
    else:
        sizes = options.get("sizes", MLP_SIZES)
        if not isinstance(sizes, (list, tuple)) or len(sizes) < 2:
            return
        first, last = "sizes[0]", f"sizes[{len(sizes) - 1}]"
        width, outputs = _whole(sizes[0]), _whole(sizes[-1])
    features = _whole(given.get("features", FEATURES))
    classes = _whole(given.get("classes", CLASSES))
    data = f"data.name = {job.data.name!r}"
    if width and features and width != features:
        said = f"{data} gives {features} numbers a sample"
        raise JobError(f"model.options.{first} = {width}: {said}; valid: {features}")
    if outputs and classes and classes > outputs:
        said = f"{data} has {classes} classes"
        raise JobError(f"model.options.{last} = {outputs}: {said}; valid: {classes} or more")


def _check_tokens(job: Job) -> None:
    """Hold the sizes of a language model against the text's blocks and the byte tokenizer's ids."""
    options, given = job.model.options, job.data.options
    tokens = _whole(given.get("context", TEXT_CONTEXT))
    if job.model.name == "gpt":
        context, words = (_gpt_size(options, name) for name in ("context", "vocab_size"))
        if context and tokens and context < tokens:
            raise JobError(
                f"model.options.context = {context}: the data's samples have {tokens} tokens; "
                f"make it as many or more; valid: {tokens} or more"
            )
    else:
        words = _whole(_config(job).get("vocab_size"))
    if words and words < BYTES and given.get("tokenizer", "bytes") == "bytes":
        raise JobError(
            f"model.options.vocab_size = {words}: the data's tokens need {BYTES} or more"
        )


def _gpt_size(options: dict[str, Any], name: str) -> int | None:
    preset = options.get("preset")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        return None
    known: dict[str, Any] = dict(zip(SIZES, PRESETS[preset], strict=True)) if preset else {}
    known = {"context": CONTEXT, "vocab_size": BYTES} | known
    return _whole(options.get(name) or known.get(name))


def _config(job: Job) -> dict[str, Any]:
    """Return the fields of a local folder's config.json that the job does not override."""
    file = Path(job.model.name.removeprefix(HF), "config.json")
    try:
        if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):  # transformers says what is wrong with it
        return {}
    overrides = job.model.options.get("overrides", {})
    if not isinstance(fields, dict) or not isinstance(overrides, dict):
        return {}
    return {**fields, **overrides}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
