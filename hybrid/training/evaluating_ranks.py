"""Is a rank of `hybrid eval`: it loads weights alone, and evaluates them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import records
from ..checkpoint.pieces import WEIGHT
from ..data import build_data
from ..engines.protocol import Engine
from ..job.errors import PeerFailed, RunError, needs_room
from ..job.schema import Job, resolve_lengths
from ..job.variants import Choice, resolve
from ..launch.environment import restored_environment
from ..launch.exchange import gather_objects
from ..launch.failures import RankStatus, leave_error
from ..launch.placement import Placement
from ..launch.process_group import cleanup
from ..launch.stopping import unbroken
from ..models.shared import build_shared
from ..models.starting import fill, match_names, require_fit
from ..models.vector_functions import call_vector_functions_once
from ..strategies import registry
from .beginning import meet
from .claiming import EVAL_RESULT as RESULT
from .evaluation import evaluate
from .leaving import as_failure
from .saved import Saved


@restored_environment()
def evaluate_and_clean_up(
    saved: Saved, strategy: str, out: Path, placement: Placement
) -> dict[str, Any]:
    """Evaluate, and leave nothing behind, whatever happens: the cause of an error comes first."""
    status = RankStatus(saved.job, placement, out / "logs")
    try:
        with needs_room(out):
            result = _evaluate(saved, strategy, out, placement, status)
        status.end()
        return result
    except BaseException as raised:
        error = as_failure(raised)
        with unbroken(placement.under_foreign_launcher):
            cause = leave_error(error, status)
        if cause is not None:
            raise PeerFailed(cause.describe()) from raised
        if error is not raised:
            raise error from raised
        raise
    finally:
        status.close()
        cleanup(status.failed)


def _evaluate(
    saved: Saved, strategy: str, out: Path, placement: Placement, status: RankStatus
) -> dict[str, Any]:
    call_vector_functions_once()
    choice = resolve(saved.job, strategy)
    placement = meet(placement, choice.job, status)
    if len({str(found) for found in gather_objects(saved.describe())}) > 1:
        raise RunError("the ranks found different checkpoints, since a run saves there; name one")
    status.set("loading the data")
    data = build_data(choice.job)
    job = resolve_lengths(choice.job, len(data[0]))
    engine = _open(saved, choice, job, placement, data[0], status)
    gather_objects(None)  # ranks load for unlike times, for which the others wait longer
    status.hurry(in_step=not job.train.compile)
    status.set("in the evaluation")
    found = evaluate(engine, data[1], job, job.micro_batches(choice.strategy))
    result = {
        **records.to_dict(found),
        "strategy": choice.name,
        "layout": engine.layout.to_dict(),
        "world_size": placement.world_size,
        "checkpoint": saved.describe(),
    }
    engine.close()
    if placement.rank == 0:
        records.write(result, out / RESULT)
    return result


def _open(
    saved: Saved,
    choice: Choice,
    job: Job,
    placement: Placement,
    train_set: Sequence[Any],
    status: RankStatus,
) -> Engine:
    """Build the engine, and put the weights into its live parts."""
    weights = saved.open()
    try:
        status.set("building the model")
        require_fit(job, weights)
        layers, loss = build_shared(job, placement)
        names = match_names(weights, layers)
        status.set("building the engine")
        engine = registry.open_engine(job, choice.strategy, layers, loss, placement, train_set)
        status.set("loading the weights")
        fill(weights, (piece for piece in engine.pieces() if piece.key == WEIGHT), names)
    finally:
        weights.close()
    scale = saved.manifest and saved.manifest.values["loss_scale"]
    engine.begin_at(saved.step or 0, scale, None)
    return engine
