"""Names the further runs in one process that a verdict can need, and starts none. No torch here.

They are the same computation with its sums in another order, so they show what rounding makes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..job.schema import Job
from ..records import Record
from .differences import Found, Run
from .noise import ROUNDED, can_be_rounding

# Control runs cut each batch into these numbers of micro-batches, which reorders the same sums. The
# later ones run where the first do not spread so far: a kink, such as relu's at 0, shows by chance.
CONTROL_MICRO_BATCHES = (1, 3, 7, 2, 5, 11)
NUM_CONTROLS = 3
LARGEST_KINK = 1e-2  # relative; a larger difference is not looked for in further controls


@dataclasses.dataclass(frozen=True)
class Control:
    """Names a further run that a verdict needs: a strategy or variant with other settings.

    cores_for: it has the threads that each of so many ranks has, and sums up in their order; left
    out, those of the run of which it is another."""

    label: str
    strategy: str
    changes: dict[str, Any]
    cores_for: int | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds what one verdict is about: the run, what it is compared with, and further runs.

    root: the label of the reference; changes: its settings. against: the label of what is compared
    with: the reference, or that run of it that is cut as the run is. layers: those whose result
    depends on how a batch is cut. cores_for: of the reference and its further runs."""

    job: Job
    name: str
    runs: Mapping[str, Record]
    root: str
    changes: dict[str, Any]
    against: str
    controls: Mapping[str, Record]
    load: Callable[[str], Run]
    layers: Sequence[str] = ()
    cores_for: int | None = None

    @property
    def known(self) -> Mapping[str, Record]:
        return {**self.controls, **self.runs}

    @property
    def strategy(self) -> str:
        return self.runs[self.name].variant_of or self.runs[self.name].strategy

    @property
    def pieces(self) -> int:
        """Count the micro-batches that all data-parallel ranks of the run have in a step."""
        return self.runs[self.name].layout["dp"] * self.job.micro_batches(self.strategy)

    @property
    def reference_strategy(self) -> str:
        return self.known[self.root].variant_of or self.known[self.root].strategy

    def control(self, label: str, **changes: Any) -> Control:
        """Name a further run like the reference, with these changes."""
        changes = self.changes | changes
        return Control(label, self.known[self.root].strategy, changes, self.cores_for)


def cut_alike(case: Case, found: Sequence[Found]) -> Control | None:
    """Return `single` cut into as many micro-batches as all ranks of the run have together.

    Gradients are rounded once for each micro-batch, to few bits in bf16, and overflow in fp16 by
    its size, and threads sum up in an order of their own: with those of a rank, that run rounds
    nearly as this one does. None: it is the reference, or what was found is neither rounding nor
    an overflow."""
    if case.layers:
        return None  # another cut is another computation
    record = case.runs[case.name]
    steps = zip(record.steps, case.known[case.root].steps, strict=False)
    overflows = any(mine.skipped != theirs.skipped for mine, theirs in steps)
    rounded = found[0].quantity in ROUNDED and found[0].size <= LARGEST_KINK
    late = all(can_be_rounding(one, 1) for one in found)
    if case.reference_strategy != "single" or not (overflows or rounded or late):
        return None
    if is_cut_alike(case) and _threads(record) == _threads(case.known[case.root]):
        return None
    ranks = record.world_size
    cut = case.control(f"{case.root}_of_{ranks}_cut_{case.pieces}", micro_batches=case.pieces)
    return dataclasses.replace(cut, cores_for=ranks)


def _threads(record: Record) -> int | None:
    return record.environment.get("threads_per_rank")


def is_cut_alike(case: Case) -> bool:
    """Tell whether the reference is `single` with its batches cut into as many pieces as the run's.

    A piece has one sample at least."""
    batch, own = case.job.train.global_batch, case.job.micro_batches("single")
    return case.reference_strategy == "single" and min(case.pieces, batch) == min(own, batch)


def list_controls(case: Case) -> list[Control]:
    """List the controls that show how far rounding goes: the same sums in other orders.

    A cut into as many pieces as another, or into more than there are samples, is no other order.
    Where too few are left, weights are moved by one rounding after the first step."""
    share = -(-case.job.train.global_batch // case.changes.get("emulate_replicas", 1))
    seen = {min(case.job.micro_batches(case.reference_strategy), share)}
    found = []
    if case.against != case.root:
        seen.add(min(int(case.against.rpartition("_")[2]), share))
        found.append(case.control(case.root))
    for cut in () if case.layers else CONTROL_MICRO_BATCHES:
        if min(cut, share) not in seen:
            seen.add(min(cut, share))
            found.append(case.control(f"{case.root}_cut_{cut}", micro_batches=cut))
    if case.reference_strategy in ("single", "local_sgd"):
        for seed in range(1, NUM_CONTROLS + 1 - len(found)):
            found.append(case.control(f"{case.root}_moved_{seed}", move_weights=seed))
    return found
