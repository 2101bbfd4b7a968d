"""One number of each tensor: linear, the same however the tensor is cut, and of every element."""

from __future__ import annotations

import itertools

import pytest
import torch

from hybrid.checkpoint.pieces import WEIGHT, Piece
from hybrid.training.projection import CHUNK, GOLDEN, SILVER, project


def projected(tensor: torch.Tensor, *cuts: int) -> float:
    """The projection of a tensor of which ranks hold the parts between cuts."""
    flat, places = tensor.reshape(-1), [0, *cuts, tensor.numel()]
    parts = [flat[first:end] for first, end in itertools.pairwise(places)]
    shape = tuple(tensor.shape)
    sums = [
        project([Piece("w", WEIGHT, shape, part, start)])["w"]
        for part, start in zip(parts, places, strict=False)
    ]
    return sum(sums)


def test_projections_are_linear_and_see_every_element() -> None:
    a, b = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y, both = (projected(t) for t in (a, b, 2 * a - 3 * b))
    assert both == pytest.approx(2 * x - 3 * y) and abs(x) > 1e-3
    seen = [projected(unit) for unit in torch.eye(200)]
    assert min(map(abs, seen)) > 1e-6 and len(set(seen)) == 200
    assert project([Piece("steps", WEIGHT, (), torch.tensor(3))]) == {}


def test_projections_do_not_depend_on_how_tensors_are_cut() -> None:
    size = 9 * CHUNK + 4321
    w = torch.randn(size, generator=torch.Generator().manual_seed(1))
    whole = projected(w)
    exact = w.double()
    places = torch.arange(size)
    factors = torch.frac((places % CHUNK).double() * GOLDEN) - 0.5
    factors *= 0.75 + torch.frac((places // CHUNK).double() * SILVER) / 2
    assert whole == pytest.approx(float(exact @ factors), rel=1e-12)
    for cuts in ([1], [CHUNK], [CHUNK - 1, CHUNK + 1], [5, 5, 3 * CHUNK + 77, 9 * CHUNK]):
        assert projected(w, *cuts) == pytest.approx(whole, rel=1e-12), cuts
    w[CHUNK], w[2 * CHUNK] = float(w[2 * CHUNK]), float(w[CHUNK])
    assert abs(projected(w) / whole - 1) > 1e-6, "two elements at like places of chunks changed"
