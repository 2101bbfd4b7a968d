"""This module runs a job's ranks as the processes of another launcher, and says how that ended.

    hybrid compare JOB --nproc 4 --launcher "srun -n {nproc}"

The launcher starts `python -m hybrid train ...` as often as it is told. Its own output goes to
`OUT/logs/launcher.log`; the ranks leave their logs and errors beside it. The job travels on their
command line, since a rank may be on a host that does not have this one's files. No torch here."""

import base64
import contextlib
import dataclasses
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..job.errors import Failure, JobError, RunFailed, Stopped
from ..records.whole import new_file
from .environment import without_launcher
from .first_cause import TAIL_LINES, first_cause, how_it_ended, left_by, read_log
from .logs import LAUNCHER_LOG, list_logs
from .lost_peers import is_peer_loss
from .orphans import end_with_parent
from .placement import Placement, find_placement
from .stopping import STOPPED, PassedOn, end_group, told
from .threads import num_cores

PLACE = "{nproc}"  # in a template: the number of processes
# These start Python themselves, and take the module's name after this option.
START_PYTHON = {"torchrun": "-m", "torch.distributed.run": "-m", "accelerate": "-m",
                "deepspeed": "--module"}  # fmt: skip
NO_PYTHON = ("--no-python", "--no_python")  # and so these do not
EXAMPLE = '"srun -n {nproc}", "torchrun --standalone --nproc-per-node {nproc}"'
GRACE_S = 10.0  # for a launcher to end its ranks
POLL_S = 0.02
_OURS = ("hybrid: warning", "hybrid: next:", "hybrid: what each rank")  # lines that tell no cause


class LauncherFailed(RunFailed):
    """Says that the processes of a launcher ended without a result."""

    def __init__(self, failure: Failure, who: str) -> None:
        RuntimeError.__init__(self, f"{who}: {failure.message}")
        self.failure = failure


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Holds how another launcher is started, as a user wrote it on the command line."""

    template: str

    @property
    def name(self) -> str:
        """Return the program's name."""
        return Path(shlex.split(self.template)[0]).name

    def command(self, nproc: int, arguments: Sequence[str]) -> list[str]:
        """Return the words that start `hybrid ARGUMENTS` as so many processes, for no shell."""
        words = [word.replace(PLACE, str(nproc)) for word in shlex.split(self.template)]
        names = [Path(word).name for word in words]
        option = next((START_PYTHON[name] for name in names if name in START_PYTHON), None)
        if option is None or any(word in NO_PYTHON for word in words):
            return [*words, sys.executable, "-m", "hybrid", *arguments]
        return [*words, option, "hybrid", *arguments]


def choose_launcher(template: str | None, command: str) -> Launcher | None:
    """Return what `--launcher` asks for, if it was given, for a command that starts ranks itself.

    Raises JobError where it cannot work, and where this process is one of several ranks: every one
    would do all of the command's work in one folder."""
    here = find_placement()
    if here.world_size > 1:
        raise JobError(
            f"{command}: this is rank {here.rank} of {here.world_size} that {here.launcher} "
            f"started; valid: in one process, which starts the ranks, also by --launcher {EXAMPLE}"
        )
    return None if template is None else _make(template)


def _make(template: str) -> Launcher:
    given = f"--launcher {template!r}"
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise JobError(f"{given}: {error}; valid: such as {EXAMPLE}") from None
    if not any(PLACE in word for word in words[1:]):
        raise JobError(f"{given}: has no {PLACE}, how many processes; valid: such as {EXAMPLE}")
    if shutil.which(words[0]) is None:
        raise JobError(f"{given}: there is no command {words[0]!r} here; valid: such as {EXAMPLE}")
    return Launcher(template)


def pack_job(job: Mapping[str, Any], nproc: int) -> str:
    """Return a job and the number of its processes as one word of a command line.

    No launcher's quoting changes it. torchrun takes `--nproc` for an option of its own."""
    text = json.dumps({"job": job, "nproc": nproc})
    return base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()


def unpack_job(word: str) -> tuple[dict[str, Any], int]:
    """Return the job and the number of processes in a word of `pack_job`; raises JobError."""
    try:
        found = json.loads(zlib.decompress(base64.urlsafe_b64decode(word)))
        return dict(found["job"]), int(found["nproc"])
    except (ValueError, LookupError, TypeError, zlib.error):
        raise JobError("--launched: holds no job; it is for `--launcher` alone") from None


def require_launched(placement: Placement, nproc: int) -> None:
    """Raise JobError unless a launcher started this process as one of `nproc` with a rank each."""
    world = placement.world_size
    if placement.launcher is None and nproc > 1:
        raise JobError(
            f"--launcher: it does not tell its {nproc} processes their ranks (RANK and WORLD_SIZE, "
            "or the variables of srun, Open MPI or MPICH)"
        )
    if world != nproc:
        raise JobError(f"--launcher: it started {world} processes, and this run has {nproc}")


def run_by_launcher(
    launcher: Launcher,
    nproc: int,
    arguments: Sequence[str],
    out: Path,
    on_poll: Callable[[], None],
    cores_for: int | None = None,
    stops: bool = False,
) -> None:
    """Run `hybrid ARGUMENTS` as `nproc` processes of a launcher, and call `on_poll` often.

    cores_for, stops: as for `hybrid.launch.local.run_ranks`. A signal goes on to the launcher as
    SIGTERM, which all of them hand on to their ranks. Raises LauncherFailed, and Stopped where a
    signal was the cause. The launcher has ended then."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in list_logs(logs):
        old.unlink(missing_ok=True)
    environ = without_launcher(keep_slurm=True) | {"PYTHONUNBUFFERED": "1"}
    if cores_for:
        environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // cores_for)))
    with PassedOn() if stops else contextlib.nullcontext():
        process = _start(
            launcher.name, launcher.command(nproc, arguments), environ, logs / LAUNCHER_LOG
        )
        passed_on = 0
        try:
            while (code := process.poll()) is None:
                on_poll()
                if told() and not passed_on:
                    passed_on = told()
                    process.terminate()
                time.sleep(POLL_S)
        finally:
            end_group(process, GRACE_S)
        on_poll()
        if code:
            raise _failure(launcher.name, nproc, code, logs, passed_on)


def _start(
    name: str, command: Sequence[str], environ: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start the launcher; raises LauncherFailed where the system cannot."""
    # A launcher that is told to end also ends its ranks; where it is killed it cannot.
    end = functools.partial(end_with_parent, os.getpid(), signal.SIGTERM)
    with new_file(log) as file:
        try:
            return subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone
                preexec_fn=end if sys.platform == "linux" else None,
            )
        except OSError as error:  # such as no interpreter of that name
            raise LauncherFailed(
                Failure(0, f"cannot be started: {error.strerror}", ""), name
            ) from None


def _failure(name: str, nproc: int, code: int, logs: Path, passed_on: int) -> BaseException:
    """Return the error that a launcher's end means.

    That is the first cause among its ranks, if one left its own, else what the launcher said."""
    dead = {n: code for n in range(nproc) if left_by(n, logs)}
    found = first_cause(dead, logs, time.time()) if dead else None
    if found and found.kind == "stopped":
        return Stopped(found.message, passed_on or signal.SIGTERM)
    if passed_on:
        words = f"{STOPPED}{signal.Signals(passed_on).name} before the first step was saved"
        return Stopped(words, passed_on)
    lines = read_log(logs / LAUNCHER_LOG).splitlines()
    if found and not is_peer_loss(found.message):
        return LauncherFailed(found, f"rank {found.rank} on {_host_of(found.rank, logs)}")
    said = [line for line in lines if line.startswith("hybrid: ") and not line.startswith(_OURS)]
    words = (said or [line for line in lines if line.strip()][-1:] or ["it printed nothing"])[0]
    words, tail = words.removeprefix("hybrid: ")[:300], "\n".join(lines[-TAIL_LINES:])
    if code == 2 and said:  # a rank's own status, where the launcher passes it on
        return LauncherFailed(Failure(0, words, tail, "job"), name)
    message = f"{how_it_ended(code)}: {words} (log: {logs / LAUNCHER_LOG})"
    return LauncherFailed(Failure(0, message, tail), name)


def _host_of(rank: int, logs: Path) -> str:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return str((left_by(rank, logs) or {})["host"])
    return socket.gethostname()
