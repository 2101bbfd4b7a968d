"""Weights on disk, as safetensors with a checksum, and weights as one number a tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FILE = "model.safetensors"
GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: fractions of its multiples fill (0, 1) evenly
CHUNK = 2**16  # elements taken to float64 at a time


def save(state: Mapping[str, torch.Tensor], folder: Path, about: Mapping[str, Any]) -> Path:
    """Write `folder/model.safetensors` and `folder/checkpoint.json` (its SHA-256 and `about`)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    save_file({name: t.contiguous() for name, t in state.items()}, path)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    text = json.dumps({"file": FILE, "sha256": checksum, **about}, indent=1)
    (folder / "checkpoint.json").write_text(text + "\n")
    return path


def project(state: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """One number a tensor: its dot product, in float64, with a fixed sequence of fractions. Linear,
    so that the ratio of two runs' changes shows by what a gradient or a rate was scaled."""
    return {name: _project(t) for name, t in state.items() if t.is_floating_point()}


def _project(tensor: torch.Tensor) -> float:
    flat, total = tensor.detach().flatten(), 0.0
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].to("cpu", torch.float64)
        places = torch.arange(start, start + piece.numel(), dtype=torch.float64)
        # Arithmetic alone. By torch.cos one process of some hundreds, on two threads, had its first
        # projection 1e-8 off, of the same weights to the last bit.
        total += float(piece @ (torch.frac(places * GOLDEN) - 0.5))
    return total
