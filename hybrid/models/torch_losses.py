"""This module turns torch's own losses into (sum, count), counted as torch's mean divides.

torch's mean over a micro-batch divides by what the loss counts: elements, samples, targets other
than `ignore_index`, or the sum of the targets' class weights. The toolkit needs the sum and that
count, so that the mean over a whole batch is exact however the batch is cut."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ..job.errors import JobError


class Kind(NamedTuple):
    """Says how one of torch's losses is called and counted.

    module: the name of its class. options: its keywords. counts: `elements` of the target,
    `samples`, or `classes`, which are counted as the options say. outputs: how many tensors it
    takes of the model; 0 is for a loss that takes three of them and no target."""

    module: str
    options: tuple[str, ...] = ()
    counts: str = "elements"
    outputs: int = 1


KINDS = {
    "cross_entropy": Kind(
        "CrossEntropyLoss", ("weight", "ignore_index", "label_smoothing"), "classes"
    ),
    "nll_loss": Kind("NLLLoss", ("weight", "ignore_index"), "classes"),
    "binary_cross_entropy_with_logits": Kind("BCEWithLogitsLoss", ("weight", "pos_weight")),
    "binary_cross_entropy": Kind("BCELoss", ("weight",)),
    "mse_loss": Kind("MSELoss"),
    "l1_loss": Kind("L1Loss"),
    "smooth_l1_loss": Kind("SmoothL1Loss", ("beta",)),
    "huber_loss": Kind("HuberLoss", ("delta",)),
    "poisson_nll_loss": Kind("PoissonNLLLoss", ("log_input", "full", "eps")),
    "gaussian_nll_loss": Kind("GaussianNLLLoss", ("full", "eps"), outputs=2),
    "kl_div": Kind("KLDivLoss", ("log_target",)),
    "soft_margin_loss": Kind("SoftMarginLoss"),
    "hinge_embedding_loss": Kind("HingeEmbeddingLoss", ("margin",)),
    "margin_ranking_loss": Kind("MarginRankingLoss", ("margin",), outputs=2),
    "cosine_embedding_loss": Kind("CosineEmbeddingLoss", ("margin",), "samples", 2),
    "multi_margin_loss": Kind("MultiMarginLoss", ("p", "margin", "weight"), "samples"),
    "multilabel_margin_loss": Kind("MultiLabelMarginLoss", (), "samples"),
    "multilabel_soft_margin_loss": Kind("MultiLabelSoftMarginLoss", ("weight",), "samples"),
    "triplet_margin_loss": Kind(
        "TripletMarginLoss", ("margin", "p", "eps", "swap"), "samples", outputs=0
    ),
}
SAME_SHAPE = {name for name, kind in KINDS.items() if kind.counts == "elements"}
FUNCTIONS: dict[Callable[..., Any], str] = {getattr(functional, name): name for name in KINDS}


class TorchLoss:
    """Calls one of torch's losses as a sum, in fp32 or finer, and counts its targets.

    ignored: the only target that does not count where each other counts one; None: the data alone
    do not tell the count. Raises ValueError where torch would broadcast the output against the
    target, which mixes samples, or where the classes are not on axis 1."""

    def __init__(self, name: str, options: Mapping[str, Any], reduction: str) -> None:
        self.name, self.kind = name, KINDS[name]
        self.options, self.reduction = dict(options), reduction
        self.counts = "samples" if reduction == "batchmean" else self.kind.counts
        plain = self.counts == "classes" and self.options.get("weight") is None
        self.ignored = int(self.options.get("ignore_index", -100)) if plain else None

    def __repr__(self) -> str:
        return f"torch's {self.kind.module}"

    def __call__(self, output: Any, target: Any) -> tuple[torch.Tensor, torch.Tensor | int]:
        outputs = [_in_fp32(tensor) for tensor in self._outputs(output)]
        device = outputs[0].device
        options = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in self.options.items()
        }
        function: Any = getattr(functional, self.name)
        if not self.kind.outputs:
            return function(*outputs, **options, reduction="sum"), self.count(target)
        aim = self._like(_only_tensor(target, f"{self}: the target"), outputs[0])
        self._check_shapes(outputs[0], aim)
        arguments = (outputs[0], aim, outputs[1]) if self.name == "gaussian_nll_loss" else None
        total = function(*(arguments or (*outputs, aim)), **options, reduction="sum")
        return total, self.count(aim)

    def count(self, target: Any) -> torch.Tensor | int:
        """Returns what torch's mean divides by; for class weights it is a float64 tensor []."""
        aim = _first_tensor(target)
        if self.counts == "samples":
            return aim.shape[0]
        if self.counts == "elements":
            return aim.numel()
        if aim.is_floating_point():  # a probability for each class on axis 1
            return aim.numel() // aim.shape[1]
        kept = aim != int(self.options.get("ignore_index", -100))
        weight = self.options.get("weight")
        if weight is None:
            return kept.sum()
        return weight.to(aim.device, torch.float64)[aim[kept].long()].sum()

    def _outputs(self, output: Any) -> list[torch.Tensor]:
        """Returns the tensors that the loss takes of the model's output."""
        wanted = self.kind.outputs or 3
        if wanted == 1:
            return [_only_tensor(output, f"{self}: the model's output")]
        given = list(output.values()) if isinstance(output, Mapping) else output
        if not isinstance(given, (list, tuple)) or len(given) != wanted:
            kind = type(output).__name__
            raise JobError(f"{self} takes {wanted} tensors of the model, which returns a {kind}")
        return list(given)

    def _like(self, target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns numbers in the output's dtype, and classes in int64.

        Python's own numbers arrive in float64, and NumPy's integers in int32; torch takes neither
        beside an output in fp32."""
        numbers = target.is_floating_point() or self.name in SAME_SHAPE
        return target.to(output.dtype) if numbers else target.long()

    def _check_shapes(self, output: torch.Tensor, target: torch.Tensor) -> None:
        shapes = f"{self}: output {list(output.shape)} and target {list(target.shape)}"
        if self.name in SAME_SHAPE and output.shape != target.shape:
            raise JobError(f"{shapes}: both must have one shape, torch would broadcast them")
        for key in ("weight", "pos_weight") if self.name in SAME_SHAPE else ():
            factor = self.options.get(key)
            if factor is not None and factor.dim() >= output.dim() and factor.shape[0] > 1:
                words = f"{self}: its {key} {list(factor.shape)} has a number for each sample"
                raise JobError(f"{words} of a batch; put them into the data's targets")
        if self.counts != "classes" or target.is_floating_point():
            return
        if output.shape[:1] + output.shape[2:] != target.shape:
            last = output.shape[:-1] == target.shape
            more = "; hybrid.cross_entropy has them on the last" if last else ""
            raise JobError(f"{shapes}: torch has the classes on axis 1 of the output{more}")


def as_torch_loss(given: Any) -> TorchLoss | None:
    """Returns one of torch's loss modules or functions as (sum, count); None where it is neither.

    A `functools.partial` of a function may set its keywords. Raises ValueError in one line where
    torch's loss is one that cannot be counted so."""
    if isinstance(given, functools.partial) and _is_torch_function(given.func):
        name = FUNCTIONS.get(given.func)
        if given.args:
            raise ValueError("a partial of torch's loss: give keywords, no positional arguments")
        return _checked(name, given.func.__name__, dict(given.keywords))
    if _is_torch_function(given):
        return _checked(FUNCTIONS.get(given), given.__name__, {})
    if not isinstance(given, nn.Module):
        return None
    forward = type(given).forward
    if not getattr(forward, "__module__", "").startswith("torch.nn.modules"):
        return None
    for name, kind in KINDS.items():
        if forward is getattr(nn, kind.module).forward:
            options = {key: getattr(given, key) for key in kind.options}
            return _checked(name, kind.module, options | {"reduction": given.reduction})
    if not hasattr(given, "reduction"):  # such as nn.Sequential; what it returns is not known
        return None
    return _checked(None, type(given).__name__, {})


def _is_torch_function(given: Any) -> bool:
    return getattr(given, "__module__", "") == "torch.nn.functional" and hasattr(given, "__name__")


def _checked(name: str | None, called: str, options: dict[str, Any]) -> TorchLoss:
    """Makes the loss of a kind; ValueError where kind, keywords or reduction are not known."""
    if name is None:
        known = ", ".join(kind.module for kind in KINDS.values())
        raise ValueError(
            f"torch's {called}: its mean cannot be taken as a sum and a count; valid: {known}, "
            "or a function (output, target) -> (sum, count)"
        )
    reduction = options.pop("reduction", "mean")
    valid = ("mean", "sum", "batchmean") if name == "kl_div" else ("mean", "sum")
    if reduction not in valid:
        told = ", ".join(valid)
        raise ValueError(f"torch's {called}: reduction = {reduction!r}; valid: {told}")
    unknown = set(options) - set(KINDS[name].options)
    if unknown:
        told = ", ".join(KINDS[name].options) or "none but reduction"
        raise ValueError(f"torch's {called}: {', '.join(sorted(unknown))}: valid keywords: {told}")
    return TorchLoss(name, options, reduction)


def _only_tensor(value: Any, what: str) -> torch.Tensor:
    """Returns the tensor in a tuple or dict of one; JobError where there are several or none."""
    if isinstance(value, torch.Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value
    found = [v for v in parts if v is not None] if isinstance(value, (Mapping, tuple, list)) else []
    if len(found) == 1 and isinstance(found[0], torch.Tensor):
        return found[0]
    kind = type(value).__name__
    raise JobError(f"{what} is a {kind}; it takes one tensor; return that, or give a function")


def _first_tensor(value: Any) -> torch.Tensor:
    """Returns the first tensor in a nesting of tuples, lists and dicts."""
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value


def _in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Returns half precision as fp32; a sum over many targets needs it."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
