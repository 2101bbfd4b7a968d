"""This module writes a folder that transformers' `from_pretrained` loads."""

import shutil
from pathlib import Path

from ...checkpoint.pieces import WEIGHT, Piece
from ...checkpoint.sources import Weights
from ...job.schema import Job
from ...job.trust import HF
from ..layers import Layers
from ..starting import fill, match_names
from . import _all_configs, _make_config

# What the source folder may have for its tokenizer and for generation; never code or pickles.
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
ONE_FILE = "100TB"  # no model is cut into several


def save_folder(job: Job, layers: Layers, weights: Weights, folder: Path) -> int:
    """Writes the job's model with these weights, and returns how many tensors it has.

    `layers` get the weights. transformers itself writes them, as it knows which of two tied names
    it looks for, and how a family's files name what its module joins."""
    names = match_names(weights, layers)
    live = layers.tensors().items()
    fill(weights, (Piece(name, WEIGHT, tuple(t.shape), t) for name, t in live), names)
    model = layers.model  # type: ignore[attr-defined]
    source = job.model.name.removeprefix(HF)
    fresh = _make_config(source, job.model.options.get("overrides") or {})
    for config, original in zip(_all_configs(model.config), _all_configs(fresh), strict=True):
        for key in ("use_cache", "output_router_logits"):  # `as_layers` has switched these off
            if hasattr(original, key):
                setattr(config, key, getattr(original, key))
        if hasattr(config, "auto_map"):  # names of code that is not in the folder
            delattr(config, "auto_map")
    model.save_pretrained(folder, max_shard_size=ONE_FILE)
    for name in BESIDE:
        if (file := Path(source, name)).is_file():
            shutil.copyfile(file, folder / name)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return len(list(file.keys()))
