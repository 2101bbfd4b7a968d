"""This module claims a folder for the results of one command, before any process starts.

The folder can be there, nothing in it that is not of this tool is in the way, and the command has
it alone (`hybrid.launch.folder_lock`). Of several ranks that a launcher started the first one does
this for all. No torch."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..job.errors import JobError
from ..launch.folder_lock import hold, hold_log, refuse_held
from ..launch.placement import OWN, Placement
from .leftovers import check_folder, check_kinds, check_ours, check_run

EVAL_RESULT = "eval.json"
EVAL_JOB = "eval.job.json"  # what the ranks of the own launcher read
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@contextlib.contextmanager
def claim_for_run(out: Path | None, placement: Placement, goes_on: bool) -> Iterator[None]:
    """Have `out` for a run while the context lasts; None: it writes nothing.

    goes_on: what is saved there stays. Raises JobError, which says who has the folder or what in it
    would be lost, and NoRoom."""
    with _claim(out, placement):
        begins = placement.launcher != OWN and not placement.launched
        if out is not None and placement.rank == 0 and begins:
            check_run(out, goes_on)
        yield


@contextlib.contextmanager
def claim_for_eval(out: Path, placement: Placement) -> Iterator[None]:
    """Have `out` for an evaluation while the context lasts; raises as `claim_for_run`."""
    with _claim(out, placement):
        if placement.rank == 0 and placement.launcher != OWN:
            check_kinds(out, [EVAL_RESULT, EVAL_JOB], ["logs"])
            check_ours(out, [EVAL_RESULT])
        yield


@contextlib.contextmanager
def _claim(out: Path | None, placement: Placement) -> Iterator[None]:
    if out is None:
        yield
    elif placement.launcher == OWN:  # the process that started this rank has the folder
        hold_log(out / "logs" / f"rank{placement.rank}.log")
        yield
    elif placement.launched:  # the same, on some host
        yield
    elif placement.rank:
        refuse_held(out, _name_of_launch())
        yield
    else:
        check_folder(out)
        with hold(out, _name_of_launch()):
            yield


def _name_of_launch() -> str:
    """Return what all ranks of a launcher know their launch by: where they meet."""
    address, port = (os.environ.get(f"MASTER_{key}", "") for key in ("ADDR", "PORT"))
    return f"{socket.gethostname() if address in _LOOPBACK else address}:{port}" if port else ""


def refuse_lost_job(
    job: Path, out: Path, unchanged: bool = False, of: Sequence[int] = (1,)
) -> None:
    """Raise JobError where the file of the job is one that a run in `out` would overwrite.

    unchanged: the job is that of the file, without `--set`; a run's own job may then be run again.
    of: how many folders down in `out`, with itself, runs lie."""
    own, real = Path(os.path.realpath(out)), Path(os.path.realpath(job))
    if real.name != "job.json" or not real.is_relative_to(own):
        return
    written = unchanged and (real.parent / "record.json").exists()
    if len(real.relative_to(own).parts) in of and not written:
        raise JobError(
            f"--out {out}: {job} is the job that was given, and would be overwritten; "
            "valid: another --out, or a copy of the job elsewhere"
        )
