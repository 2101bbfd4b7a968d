"""This module counts correct predictions, where the loss shows what the predictions are.

The loss's own call of torch's loss is watched: cross-entropy has class scores on axis 1, a binary
cross-entropy of one number a sample has its sign. A loss that calls neither, or several, has no
accuracy: nothing is guessed from shapes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from ..models.loss_calls import LossCall
from .hashes import hash_ids

CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss")
BINARY = {"binary_cross_entropy_with_logits": 0.0, "binary_cross_entropy": 0.5}  # where 1 begins
TOKENS, SCORED, UNKNOWN, UNCLEAR = 2, 1, 0, -1


class Scores:
    """Sums correct predictions over the micro-batches of one evaluation, on one rank.

    kind: TOKENS where a sample has several targets with classes, SCORED where predictions are
    known, UNKNOWN before any, UNCLEAR for good once a micro-batch had none. scored: the
    predictions. entropy: their cross-entropy in nats, without weights or smoothing. predictions: a
    hash of all of them, None where they cannot be told apart by sample."""

    def __init__(self) -> None:
        self.kind = UNKNOWN
        self.correct: torch.Tensor | int = 0
        self.scored: torch.Tensor | int = 0
        self.entropy: torch.Tensor | float = 0.0
        self.predictions: int | None = 0

    def add(self, calls: Sequence[LossCall], target: Any, ids: torch.Tensor) -> None:
        """Count the predictions of one micro-batch, whose samples are `ids` (int64 [n])."""
        known = [call for call in calls if call.name in (*CLASSES, *BINARY)]
        found = self._find(known[0], len(ids)) if len(known) == 1 else None
        if found is None or self.kind == UNCLEAR:
            self.kind = UNCLEAR
            return
        predicted, wanted, counted = found
        self.correct = self.correct + ((predicted == wanted) & counted).sum()
        self.scored = self.scored + counted.sum()
        self.kind = max(self.kind, SCORED)
        if known[0].name in CLASSES[:2]:
            self.entropy = self.entropy + _entropy(known[0])
            grid = isinstance(target, torch.Tensor) and target.dim() == 2
            if grid and predicted.numel() > len(ids):
                self.kind = TOKENS
        self._hash(predicted, ids)

    def _find(
        self, call: LossCall, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return predicted and wanted classes and which of them count; None where it is unclear."""
        output, target = call.arguments["input"], call.arguments["target"]
        if call.name in BINARY:
            wanted = target.detach()
            if output.numel() != rows or not ((wanted == 0) | (wanted == 1)).all():
                return None
            return (output > BINARY[call.name]).long(), wanted.long(), wanted == wanted
        if target.is_floating_point() or output.dim() < 2 or output.shape[1] < 2:
            return None
        ignored = call.arguments.get("ignore_index")
        counted = target == target if ignored is None else target != ignored
        return output.argmax(1), target, counted

    def _hash(self, predicted: torch.Tensor, ids: torch.Tensor) -> None:
        if self.predictions is None or predicted.numel() % len(ids):
            self.predictions = None
            return
        flat = predicted.reshape(len(ids), -1)
        places = torch.arange(flat.shape[1], device=flat.device) * 2**32
        mixed = (flat + places).flatten() + 1
        spread = ids.repeat_interleave(flat.shape[1])
        self.predictions = (self.predictions + hash_ids(spread, mixed)) % 2**64


def _entropy(call: LossCall) -> torch.Tensor:
    """Return the summed cross-entropy of a call, float64 []: its result where that is it."""
    options = call.arguments
    plain = options["weight"] is None and not options.get("label_smoothing")
    if plain and options["reduction"] == "sum":
        return call.value.to(torch.float64)
    function: Any = getattr(functional, call.name)
    output, target = options["input"].float(), options["target"]
    total: torch.Tensor = function(
        output, target, ignore_index=options["ignore_index"], reduction="sum"
    )
    return total.to(torch.float64)
