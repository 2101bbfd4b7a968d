"""Projects each tensor of weights to one number, which shows how far apart two runs are."""

import functools
from collections.abc import Iterable

import torch

from ..checkpoint.pieces import Piece, Share, shares_of
from ..launch.exchange import gather_objects

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: fractions of its multiples fill (0, 1) evenly
SILVER = 0.4142135623730951  # sqrt(2) - 1, whose multiples' fractions do too
IN_PLACE = {"nan": 1.0, "posinf": 2.0, "neginf": 3.0}  # of what is not finite, so that it shows
CHUNK = 2**16  # elements that are multiplied by one table of fractions
ROWS = {"cpu": 8, "cuda": 256}  # chunks at a time: 4 MiB of float64 stay in a core's cache


def project(pieces: Iterable[Piece]) -> dict[str, float]:
    """Return the dot product, in float64, of each floating-point tensor with fixed factors.

    Collective: each rank projects what it holds of `pieces`, where it lies, and what several ranks
    hold is shared out. The result is alike on all ranks. It is linear, so the ratio of two runs'
    changes shows by which factor a gradient or a learning rate was scaled. It does not depend on
    how tensors are cut, but for the order of sums (1e-16 of the sum of magnitudes)."""
    floats = [piece for piece in pieces if piece.tensor.is_floating_point()]
    sums = [(share.piece.name, _project(share)) for share in shares_of(floats)]
    ranks = gather_objects([[piece.name for piece in floats], sums])
    found = {name: 0.0 for names, _ in ranks for name in names}
    for _, parts in ranks:
        for name, part in parts:
            found[name] += part
    return found


@functools.cache
def _fractions(device: torch.device) -> torch.Tensor:
    places = torch.arange(CHUNK, dtype=torch.float64)
    # Only arithmetic: with torch.cos, one process in some hundreds (on two threads) got a first
    # projection that was 1e-8 off, from weights that were equal to the last bit.
    return (torch.frac(places * GOLDEN) - 0.5).to(device)


def _project(share: Share) -> float:
    """Return what a share adds to its tensor's projection.

    Element i of a tensor has the factor of its place in its chunk times that of the chunk."""
    flat, table = share.read(0, share.count), _fractions(share.piece.tensor.device)
    sums, first = list[torch.Tensor](), 0
    while first < len(flat):
        chunk, place = divmod(share.start + first, CHUNK)
        rows = min((len(flat) - first) // CHUNK, ROWS.get(flat.device.type, 1)) if not place else 0
        size = rows * CHUNK or min(CHUNK - place, len(flat) - first)
        block = flat[first : first + size].view(max(1, rows), -1)
        sums.append(_dot(block, table[place : place + block.shape[1]], chunk))
        first += size
    return float(torch.stack(sums).sum()) if sums else 0.0


def _dot(block: torch.Tensor, factors: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the sum of a block's products, float64 []; its rows are chunks, from `chunk` on."""
    exact = block.to(torch.float64)
    sums = exact @ factors
    if not sums.isfinite().all():
        sums = exact.nan_to_num(**IN_PLACE) @ factors
    numbers = torch.arange(chunk, chunk + len(sums), dtype=torch.float64, device=sums.device)
    return sums @ (0.75 + torch.frac(numbers * SILVER) / 2)
