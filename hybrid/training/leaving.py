"""Says as what a rank ends, whose own error may follow from another rank's or from a signal."""

from ..job.errors import PeerFailed, RunError, Stopped, is_users_exit
from ..launch.blame import Cause
from ..launch.lost_peers import is_peer_loss
from ..launch.stopping import STOPPED, StopSignals, told


def as_failure(error: BaseException) -> BaseException:
    """Return an error in place of a `sys.exit` in the user's code: no such end is the run's."""
    if not is_users_exit(error):
        return error
    failure = RunError(f"sys.exit({error.code!r}) before the end of the run")  # type: ignore[attr-defined]
    return failure.with_traceback(error.__traceback__)


def failure_of(error: BaseException, cause: Cause | None, stops: StopSignals) -> BaseException:
    """Return as what a rank ends that met this error, and whose peers say that cause.

    A rank that was told to stop, and whose peers were too, has lost them for that."""
    if isinstance(error, Stopped):
        return error
    if cause is not None and not cause.message.startswith(STOPPED):
        return PeerFailed(cause.describe())
    if told() and (cause is not None or is_peer_loss(str(error))):
        return stops.stopped(told())
    return error if cause is None else PeerFailed(cause.describe())
