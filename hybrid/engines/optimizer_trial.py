"""This module finds out, before any process starts, how a job's own optimizer may be cut.

Engines give an optimizer other tensors than the model's: FSDP2 rows of each, ZeRO pieces of a flat
buffer, a stage of a pipeline some of the model's tensors alone. An optimizer that is element-wise,
such as Adam, computes the same over them. Others do not: Muon computes over whole matrices,
Adafactor over rows and columns, LAMB over the norm of a tensor, Prodigy over all tensors. No name
tells which, so this measures it: small tensors with shapes like the model's are stepped a few
times, whole and cut, with the same gradients."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..job.errors import JobError, first_line, tell_error
from ..job.schema import Job
from ..job.users_code import passes
from ..models.layers import Layers
from .optimizer import build_optimizer, no_decay_names, set_learning_rate
from .optimizer_numbers import unsaved
from .own_optimizer import is_own
from .precision import state_dtypes

Tensors = dict[str, torch.Tensor]
PIECES = 3  # into which tensors are cut; sizes of the shapes seldom divide by it
MOST_TENSORS, MOST_ELEMENTS = 8, 2**12
# Of the gradients in each step: an optimizer may clip by a norm, or bound a ratio of norms.
SCALES = (1e-2, 1.0, 10.0)
LR_RANGE = 1e-3, 1.0  # rates under which an update stands out of the rounding of the weights
DECAY = 0.5  # a weight decay whose effect cannot be overlooked
# Relative to the largest update. Operations of torch on a CPU round the last few numbers of a
# tensor otherwise, which is 1e-6 here; cut rows or norms of pieces give more than 1e-2.
SAME = 1e-3


def check_optimizer(job: Job, layers: Layers) -> dict[str, str]:
    """Return why the job's own optimizer cannot run over tensors that are cut, by how they are.

    The keys are those of `refusals.CUTS`; an optimizer by name has no problem.
    Raises JobError where the optimizer cannot be made or stepped at all, or where it leaves out
    what the job asks for: the learning rate, the weight decay, state in fp32."""
    if not is_own(job):
        return {}
    no_decay = no_decay_names(layers, job.optimizer.no_decay)
    named = {name: p for p, name in layers.names().items()}
    if not any(p.is_meta for p in named.values()):
        build_optimizer(job, named, no_decay)  # it may refuse these very parameters
    lr = min(max(job.optimizer.lr, LR_RANGE[0]), LR_RANGE[1])
    trained = {n: list(p.shape) for n, p in named.items() if p.requires_grad}
    shapes = small_shapes(trained, no_decay)
    with torch.random.fork_rng(devices=[]):
        trial = _Trial(_with(job, lr=lr), shapes, no_decay)
        whole = trial.check()
        return trial.problems(whole)


def small_shapes(
    shapes: Mapping[str, list[int]], no_decay: Collection[str]
) -> dict[str, list[int]]:
    """Return some shapes that stand for all: each number of axes, then each further shape.

    Those in `no_decay` have stand-ins of their own. Large shapes are made smaller. Scalars and
    tensors without elements are left out."""
    found: dict[tuple[bool, tuple[int, ...]], str] = {}
    for name, shape in shapes.items():
        small = list(shape)
        while math.prod(small) > MOST_ELEMENTS:
            longest = small.index(max(small))
            small[longest] = small[longest] // 2 | 1  # odd: the pieces of a cut then differ
        if small and 0 not in small:
            found.setdefault((name in no_decay, tuple(small)), name)
    firsts = {(spared, len(s)): (spared, s) for spared, s in reversed(found)}.values()
    chosen = [*firsts, *(key for key in found if key not in firsts)][:MOST_TENSORS]
    return {found[key]: list(key[1]) for key in chosen} or {"0.weight": [7, 5]}


class _Trial:
    """Steps one optimizer over small tensors, whole and in pieces.

    A run of it starts from the same numbers and has the same gradients."""

    def __init__(
        self, job: Job, shapes: Mapping[str, list[int]], no_decay: Collection[str]
    ) -> None:
        self.job, self.no_decay = job, no_decay
        self.given = f"optimizer.name = {job.optimizer.name!r}"
        draw = torch.Generator().manual_seed(0)
        # Sizes grow along a tensor, so that a mean over it is that of none of its pieces.
        grows = {n: torch.linspace(0.2, 2, math.prod(s)).view(s) for n, s in shapes.items()}
        self.start = {n: torch.randn(s, generator=draw) * 0.1 for n, s in shapes.items()}
        self.gradients: list[Tensors] = [
            {n: torch.randn(g.shape, generator=draw) * g * scale for n, g in grows.items()}
            for scale in SCALES
        ]

    def check(self) -> Tensors:
        """Step whole tensors, and return them; raises JobError where the optimizer is no good."""
        try:
            optimizer, whole = self.run()
        except JobError:
            raise
        except BaseException as error:  # a user's step may raise anything
            if passes(error):
                raise
            raise JobError(f"{self.given}: cannot step: {tell_error(error)}") from error
        if not all(bool(torch.isfinite(t).all()) for t in whole.values()):
            raise JobError(f"{self.given}: its update of small gradients is not finite")
        if all(torch.equal(whole[n], t) for n, t in self.start.items()):
            raise JobError(f"{self.given}: its step leaves all parameters as they are")
        if (dtypes := state_dtypes(optimizer)) not in ("fp32", "none"):
            raise JobError(f"{self.given}: keeps its state in {dtypes}; valid: fp32")
        if self.job.checkpoint.every and (problem := unsaved(optimizer)):
            raise JobError(f"{self.given}: {problem}; or leave checkpoint.every out")
        self.check_settings(whole)
        return whole

    def check_settings(self, whole: Tensors) -> None:
        """Raise JobError where the learning rate or the weight decay of a group has no effect."""
        chosen, schedule = self.job.optimizer, self.job.schedule
        lower = _Trial(_with(self.job, lr=chosen.lr / 2), *self.like()).run()[1]
        if _equal(whole, lower):
            raise JobError(f"{self.given}: optimizer.lr has no effect on it")
        varies = schedule.name != "constant" or schedule.warmup_steps
        if varies and _equal(whole, self.run(after_first=lambda o: set_learning_rate(o, 0.0))[1]):
            raise JobError(
                f"{self.given}: does not read the lr of its groups after the first step: a "
                "schedule has no effect on it"
            )
        if chosen.weight_decay:
            decays = _Trial(_with(self.job, weight_decay=DECAY), *self.like())
            if _equal(decays.run()[1], decays.run(before_first=_no_decay)[1]):
                raise JobError(
                    f"optimizer.weight_decay = {chosen.weight_decay}: {chosen.name!r} does not "
                    "read the weight_decay of its groups; valid: 0"
                )

    def like(self) -> tuple[dict[str, list[int]], Collection[str]]:
        """Return the arguments of another trial of the same shapes."""
        return {n: list(t.shape) for n, t in self.start.items()}, self.no_decay

    def problems(self, whole: Tensors) -> dict[str, str]:
        """Return what `check_optimizer` does."""
        ways: dict[str, Callable[[], Tensors]] = {
            "rows": self.by_rows,
            "flat": self.by_flat_pieces,
            "stages": self.one_by_one,
        }
        found = {way: said for way, run in ways.items() if (said := self.compare(run, whole))}
        optimizer, other = self.run(seed=1)
        if not _equal(whole, other):
            found["ranks"] = "it draws random numbers, which each rank would draw for itself"
        if len(optimizer.param_groups) != len({name in self.no_decay for name in self.start}):
            found["groups"] = "it makes groups of its own, which may differ by stage"
        if isinstance(optimizer, torch.optim.Adagrad) and len(optimizer.param_groups) > 1:
            # Read in deepspeed/runtime/zero/stage_1_and_2.py and stage3.py (0.19.8).
            found["flat"] = "DeepSpeed makes Adagrad anew, with one weight decay for all parameters"
        return found

    def compare(self, run: Callable[[], Tensors], whole: Tensors) -> str | None:
        """Say how far an update of cut tensors is from that of whole ones, None: rounding."""
        try:
            cut = run()
        except Exception as error:  # such as an optimizer of matrices alone
            return f"it fails over tensors cut so ({type(error).__name__}: {first_line(error)})"
        largest = max(float((whole[n] - t).abs().max()) for n, t in self.start.items())
        off = max(float((whole[n] - t).abs().max()) for n, t in cut.items()) / largest
        if off <= SAME:
            return None
        return f"it is not element-wise: cut so, its update is off by {off:.1e} (measured)"

    def run(
        self,
        pick: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        names: Collection[str] = (),
        before_first: Callable[[Any], None] | None = None,
        after_first: Callable[[Any], None] | None = None,
        seed: int = 0,
    ) -> tuple[torch.optim.Optimizer, Tensors]:
        """Make an optimizer over a part of each tensor, by `pick`, and step it.

        names: of the tensors, left out all. seed: of what it may draw. Returns the optimizer and
        the tensors it has stepped."""
        torch.manual_seed(seed)
        start = {n: pick(t) for n, t in self.start.items() if n in (names or self.start)}
        live = {n: nn.Parameter(t.clone()) for n, t in start.items()}
        optimizer = build_optimizer(self.job, live, self.no_decay)
        if before_first:
            before_first(optimizer)
        for i, gradients in enumerate(self.gradients):
            for name, parameter in live.items():
                parameter.grad = pick(gradients[name]).clone()
            optimizer.step()
            if after_first and i == 0:
                after_first(optimizer)
        return optimizer, {n: p.detach() for n, p in live.items()}

    def by_rows(self) -> Tensors:
        """Step the rows of each rank, as FSDP2 does; the last ranks may have none."""
        ranks = [self.run(lambda t, r=r: _rows(t, r))[1] for r in range(PIECES)]  # type: ignore[misc]
        return {n: torch.cat([rank[n] for rank in ranks]) for n in self.start}

    def one_by_one(self) -> Tensors:
        """Step each tensor by an optimizer of its own, as stages do."""
        return {n: self.run(names=[n])[1][n] for n in self.start}

    def by_flat_pieces(self) -> Tensors:
        """Step the pieces of each group's flat buffer, as DeepSpeed's ZeRO does."""
        ranks = [self.flat_piece(r) for r in range(PIECES)]
        whole: Tensors = {}
        for names, *pieces in zip(ranks[0][0], *(rank[1] for rank in ranks), strict=True):
            flat, at = torch.cat(pieces), 0
            for name in names:
                size = self.start[name].numel()
                whole[name] = flat[at : at + size].view_as(self.start[name])
                at += size
        return whole

    def flat_piece(self, rank: int) -> tuple[list[list[str]], list[torch.Tensor]]:
        """Step one rank's piece of each group: the names in each, and the piece.

        The optimizer is made over whole tensors. Then the piece takes the place of a group's
        parameters, as DeepSpeed does it."""
        live = {n: nn.Parameter(t.clone()) for n, t in self.start.items()}
        optimizer = build_optimizer(self.job, live, self.no_decay)
        by_parameter = {p: n for n, p in live.items()}
        names = [[by_parameter[p] for p in group["params"]] for group in optimizer.param_groups]
        pieces = [nn.Parameter(_piece([self.start[n] for n in group], rank)) for group in names]
        for group, piece in zip(optimizer.param_groups, pieces, strict=True):
            group["params"] = [piece]
        for gradients in self.gradients:
            for inside, piece in zip(names, pieces, strict=True):
                piece.grad = _piece([gradients[n] for n in inside], rank)
            optimizer.step()
        return names, [piece.detach() for piece in pieces]


def _with(job: Job, **changes: float) -> Job:
    """Return the job with other settings of the optimizer."""
    return job.model_copy(update={"optimizer": job.optimizer.model_copy(update=changes)})


def _no_decay(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0


def _equal(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(t, other[n]) for n, t in one.items())


def _rows(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Return one rank's rows of a tensor, none where there are too few."""
    pieces = tensor.chunk(PIECES)
    return pieces[rank] if rank < len(pieces) else tensor[:0]


def _piece(tensors: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """Return one rank's piece of a flat buffer of tensors, padded to equal pieces."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    size = -(-flat.numel() // PIECES)
    return nn.functional.pad(flat, (0, PIECES * size - flat.numel())).split(size)[rank].clone()
