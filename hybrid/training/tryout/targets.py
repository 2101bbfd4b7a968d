"""This module looks at targets that are classes: their dtype, and that the output has each class.

Which targets are classes is known by watching the loss call torch's: then the scores' shape tells
how many classes there are. All targets are looked at where a set has them in memory."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import TensorDataset

from ...data.forms import split_sample
from ...data.loader import copied
from ...data.samples import JobSet, find_base, reader_of
from ...data.targets import IGNORED_TARGET
from ...job.users_code import passes
from ...models import FAMILIES
from ...models.torch_losses import FUNCTIONS, KINDS
from .finding import Finding
from .nested import map_tensors
from .trial import Trial, describe

CLASSES = {name for name, kind in KINDS.items() if kind.counts == "classes"}
MOST_ROWS, MOST_SAMPLES = 2**22, 2**12  # of a set of tensors, and of a list, that are looked at


class Scores(NamedTuple):
    """Says for how many classes there are scores, and which target counts for none."""

    shape: tuple[int, ...]
    ignored: int

    @property
    def classes(self) -> int:
        """Return the number of classes: the second axis, or the only one."""
        return self.shape[1] if len(self.shape) > 1 else self.shape[0]


class _Asked(TorchFunctionMode):
    """Notes what torch's losses of classes are called with, also where they then raise."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Scores, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if FUNCTIONS.get(func) in CLASSES:
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            scores, target, ignored = (
                given.arguments[key] for key in ("input", "target", "ignore_index")
            )
            self.calls.append((Scores(tuple(scores.shape), ignored), target))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def check_targets(trial: Trial, output: Any, test: Sequence[Any]) -> Finding | None:
    """Find a target of a dtype that is no class, or beyond the classes that the output has.

    output: what the model gave for the batch."""
    target = trial.batch.target
    asked = _ask(trial, output)
    if len(asked) != 1 or not isinstance(target, torch.Tensor):
        return None
    scores, given = asked[0]
    if not _same_numbers(given, target):
        return None  # the loss makes others of them
    if given.is_floating_point() and tuple(given.shape) == scores.shape:
        return None  # a probability for each class
    if given.dtype not in (torch.int64, torch.uint8):
        text = f"{trial.data_name}: targets are {describe(target)}, and the loss takes classes"
        return Finding(f"{text}; valid: int64, 0 to {scores.classes - 1}", fatal=True)
    return _beyond(trial, target, scores) or check_set(trial, scores, test)


def _ask(trial: Trial, output: Any) -> list[tuple[Scores, Any]]:
    """Return the calls of torch's losses of classes, with what each is given."""
    with _Asked() as asked:
        try:
            trial.loss(map_tensors(output, torch.clone), copied(trial.batch.target))
        except BaseException as error:  # the loss is judged later
            if passes(error):
                raise
    return asked.calls


def _same_numbers(given: torch.Tensor, target: torch.Tensor) -> bool:
    """Tell whether a loss takes the targets as they are, perhaps as wider integers."""
    if given.is_floating_point() or given.numel() != target.numel():
        return given.dtype == target.dtype and given.numel() == target.numel()
    return torch.equal(given.flatten().long(), target.flatten().long())


def _beyond(trial: Trial, target: torch.Tensor, scores: Scores) -> Finding | None:
    """Find a class beyond those of the scores in the batch, whose rows are samples."""
    place = _first_beyond(target, scores)
    return None if place is None else _tell(trial, "train", *place, scores)


def _first_beyond(target: torch.Tensor, scores: Scores) -> tuple[int, int] | None:
    """Return the row of the first target that is no class, and its value; None where all are."""
    wrong = ((target < 0) | (target >= scores.classes)) & (target != scores.ignored)
    if target.dim() == 0 or not bool(wrong.any()):
        return None
    row = int(torch.nonzero(wrong)[0, 0])
    return row, int(target[row][wrong[row]].flatten()[0])


def _tell(trial: Trial, side: str, i: int, value: int, scores: Scores) -> Finding:
    text = f"{trial.data_name}: the target of {side} sample {i} is {value}"
    valid = f"0 to {scores.classes - 1}, or {scores.ignored} for a target that does not count"
    said = f"{trial.model_name} has scores of {scores.classes} classes"
    return Finding(f"{text}, and {said}; valid: {valid}", fatal=True)


def last_scores(trial: Trial) -> Scores | None:
    """Return the scores of a shipped family without running it; None for other models."""
    if trial.job.model.name not in FAMILIES:
        return None
    linear = [module for module in trial.modules if isinstance(module, nn.Linear)]
    return Scores((1, linear[-1].out_features), IGNORED_TARGET)


def check_set(trial: Trial, scores: Scores, test: Sequence[Any]) -> Finding | None:
    """Find a class beyond those of the scores in what the sets have in memory."""
    for side, samples in (("train", trial.samples), ("test", test)):
        if isinstance(samples, JobSet) and samples.collate is not None:
            continue  # it may change them
        base, _ = find_base(samples, [])
        whole = reader_of(base) is TensorDataset
        if not whole and type(base) not in (list, tuple):
            continue
        most = MOST_ROWS if whole else MOST_SAMPLES
        _, places = find_base(samples, list(range(min(len(samples), most))))
        for i, target in enumerate(_targets(base, places)):
            found = _first_beyond(target, scores) if _is_classes(target) else None
            if found:
                return _tell(trial, side, i + found[0], found[1], scores)
    return None


def _targets(base: Any, places: list[int]) -> Sequence[torch.Tensor]:
    """Return the targets in memory: one tensor of all, or a row of each sample of a list."""
    if reader_of(base) is TensorDataset and len(base.tensors) == 2 and base.tensors[1].dim():
        target = base.tensors[1]
        whole = len(places) == len(target) and places[:1] == [0] and places[-1] == len(target) - 1
        return [target if whole else target[places]]
    if type(base) not in (list, tuple):
        return []
    found = [split_sample(base[place])[1] for place in places]
    return [
        torch.as_tensor(y)[None] if isinstance(y, (int, torch.Tensor)) else _NONE for y in found
    ]


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NONE = torch.zeros(1)  # of a sample whose target is no class


def _is_classes(target: torch.Tensor) -> bool:
    return target.layout is torch.strided and target.dtype in _INTEGERS
