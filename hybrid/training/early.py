"""Checks what a job and a command say by themselves, before torch is imported. No torch here.

That is: whether so many processes can be started here, whether degrees multiply to them, whether a
batch has a sample for each, whether there are as many layers as stages, and whether the first layer
takes what the data set gives. The try-out (`hybrid.training.tryout`) finds what only shows when
something runs."""

from collections.abc import Sequence

from ..job.errors import JobError, Unsupported
from ..job.reading import show
from ..job.schema import Job
from ..job.variants import DEGREES, READ_DEGREES, Choice, resolve
from ..launch.devices import check_gpus
from ..launch.limits import check_processes, check_workers
from ..layout import Layout, LayoutError
from ..models import FAMILIES
from ..models.outline import check_fit, count_layers
from ..stages.checks import too_many_stages
from ..stages.partition import partition
from ..strategies import registry
from .check import print_warnings


def check_early(
    job: Job,
    names: Sequence[str],
    nproc: int | None,
    alone: bool = False,
    here: bool = True,
    starts: bool = True,
) -> int:
    """Return the number of processes, after all that is known without torch has been checked.

    names: of strategies and variants. nproc: left out, what their degrees ask for. alone: no other
    run is asked for, so that one that is not possible raises Unsupported. here: the processes start
    on this host, not where a launcher has them. starts: they do start, and need devices. Raises
    JobError."""
    nproc = count_processes(job, names, nproc, here)
    if here:
        check_workers(job.data.workers, nproc)
    most = _check_runs(job, names, nproc, alone)
    if here and starts:
        check_gpus(job.launch.device, most, has_degrees(job, names))
    return nproc


def check_run(job: Job, name: str, nproc: int) -> None:
    """Do what `check_early` does, for one run whose processes a launcher has started."""
    _check_runs(job, [name], nproc, alone=True)


def _check_runs(job: Job, names: Sequence[str], nproc: int, alone: bool) -> int:
    """Check what is known of each run, print warnings, and return the most processes of a run."""
    layouts, layers = list[tuple[Choice, Layout]](), count_layers(job)
    for name in names:
        choice = resolve(job, name)
        try:
            layout, _ = registry.find_layout(job, name, nproc)
            layouts.append((choice, layout))
            _check_stages(choice, layout, layers)
        except LayoutError as error:
            raise JobError(f"{error} (--nproc {nproc})") from None
        except Unsupported:
            if alone:
                raise
    check_fit(job)
    print_warnings(_unused_degrees(job, layouts, nproc))
    return max((_num_started(choice, layout) for choice, layout in layouts), default=1)


def _num_started(choice: Choice, layout: Layout) -> int:
    """Return how many processes a run starts: an emulation of local SGD's ranks is one."""
    emulates = choice.job.strategy.local_sgd.emulate_replicas is not None
    return 1 if choice.strategy == "local_sgd" and emulates else layout.world_size


def count_processes(job: Job, names: Sequence[str], nproc: int | None, here: bool = True) -> int:
    """Return the number of processes; raises JobError where so many cannot be started.

    here: see `check_early`."""
    if nproc is not None:
        check_processes(nproc, "--nproc", here)
        return nproc
    most = 0
    for name in names:
        choice = resolve(job, name)
        asked = default_nproc(choice.job)
        variant = f"variant.{name}: " if choice.variant_of else ""
        check_processes(asked, f"{variant}{_tell_degrees(choice.job)}", here)
        most = max(most, asked)
    return most


def _check_stages(choice: Choice, layout: Layout, layers: int | None) -> None:
    """Check a run's stages, where the number of layers is known; raises JobError or Unsupported."""
    if not layers or layout.pp == 1:
        return
    if problem := too_many_stages(choice.strategy, layout.pp, layers):
        raise Unsupported(problem)
    cut = getattr(choice.job.settings(choice.strategy), "partition", None)
    if isinstance(cut, list) and choice.job.model.name in FAMILIES:
        try:
            partition(cut, [1] * layers, layout.pp)
        except JobError as error:
            raise registry.of_variant(choice, error) from None


def has_degrees(job: Job, names: Sequence[str]) -> bool:
    """Tell whether `[parallel]` names a degree, in the job or in one of the variants."""
    sections = [resolve(job, name).job.parallel for name in names]
    return any(getattr(one, key) is not None for one in sections for key in DEGREES)


def default_nproc(job: Job) -> int:
    """Return the number of processes that `[parallel]` asks for; 2 where it names no degree."""
    p = job.parallel
    return (p.pp or 1) * (p.dp or 1) if p.pp or p.dp else (p.replicate or 1) * (p.shard or 2)


def _unused_degrees(job: Job, layouts: Sequence[tuple[Choice, Layout]], nproc: int) -> list[str]:
    """Return a line for each degree in [parallel] that none of the runs has.

    Strategies with one axis put all processes on it, whatever the degrees say. A run on so many
    processes as the degree asks for has it all the same."""
    found = []
    for key in DEGREES:
        asked = getattr(job.parallel, key)
        if asked is None or asked == 1 or not layouts:
            continue
        if not any(_has(choice, layout, key) for choice, layout in layouts):
            under = ", ".join(choice.name for choice, _ in layouts)
            readers = " and ".join(one for one, keys in READ_DEGREES.items() if key in keys)
            found.append(
                f"parallel.{key} = {asked} has no effect under {under}, on {nproc} processes; "
                f"{readers} has it"
            )
    return found


def _has(choice: Choice, layout: Layout, key: str) -> bool:
    """Tell whether a run has the degree that [parallel] asks for, or reads it in its own way."""
    reads = READ_DEGREES.get(choice.strategy, ())
    own = choice.strategy not in registry.NAMES  # such a strategy may read all degrees
    return own or key in reads or getattr(layout, key) == getattr(choice.job.parallel, key)


def _tell_degrees(job: Job) -> str:
    given = {key: getattr(job.parallel, key) for key in DEGREES}
    told = [f"parallel.{key} = {show(value)}" for key, value in given.items() if value is not None]
    return ", ".join(told) or "--nproc"
