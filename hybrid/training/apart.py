"""Checks a job in a process of its own, so that the process that starts the ranks needs no torch.

That process is a fork of the warm one, which imports torch for the ranks in any case. What it
prints appears on stderr. Where torch is imported already, or ranks start afresh, nothing is gained,
and this process checks the job itself.
"""

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import records
from ..job.errors import CheckFailed, JobError, kind_of, tell_error
from ..job.file import load_job, to_dict
from ..job.given import given_functions
from ..job.schema import Job
from ..job.traces import text_of
from ..job.users_code import passes
from ..launch.first_cause import how_it_ended
from ..launch.local import end
from ..launch.warm import Rank, ServerGone, WarmProcess, warm_process
from ..stages.checks import ModelSummary
from .check import CheckedJob, look_at_job
from .tryout.finding import Finding

POLL_S = 0.02
# Imported before the fork, since the ranks need them too; torch comes with them.
MODULES = (
    "hybrid.data",
    "hybrid.engines.summary",
    "hybrid.models",
    "hybrid.stages.shapes",
    "hybrid.training.tryout.run",
    "torch._dynamo",  # torch imports it for a linear layer on its meta device
)


def check_apart(job: Job, modules: Sequence[str]) -> CheckedJob:
    """Return what `look_at_job` does, and raise what it raises; CheckFailed for any other error.

    modules: of the ranks that start next, which the warm process imports meanwhile."""
    warm = None if "torch" in sys.modules and not given_functions() else warm_process()
    if warm is None:
        return _look_here(job)
    with contextlib.ExitStack() as files:
        # Files without a name, which the child opens by this process's descriptors: none is left.
        asked, answer, log = (_nameless_file(files, name) for name in ("job", "answer", "log"))
        os.write(asked, json.dumps(to_dict(job)).encode())
        try:
            child = _start(warm, asked, answer, log)
            warm.prepare(modules)
        except ServerGone:
            return _look_here(job)
        code = _follow(child, log)
        said = os.pread(answer, os.fstat(answer).st_size, 0)
    if code or not said:
        raise CheckFailed(
            f"the process that checks the job {how_it_ended(code)} before it was done"
            + ("" if code else ", in a call of os._exit or the like in the job's own code")
        )
    return _read(json.loads(said))


def _look_here(job: Job) -> CheckedJob:
    try:
        return look_at_job(job)
    except SystemExit as error:
        if passes(error):
            raise
        raise CheckFailed(f"checking the job: {tell_error(error)}") from error


def _nameless_file(files: contextlib.ExitStack, name: str) -> int:
    descriptor = os.memfd_create(name)
    files.callback(os.close, descriptor)
    return descriptor


def _path(descriptor: int) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")


def _start(warm: WarmProcess, asked: int, answer: int, log: int) -> Rank:
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    program, arguments = ["-m", __name__], [str(_path(asked)), str(_path(answer))]
    return warm.fork(program, arguments, variables, _path(log), MODULES)


def _follow(child: Rank, log: int) -> int:
    """Wait for the child, print what it prints meanwhile, and return its exit code."""
    try:
        while (code := child.poll()) is None:
            _relay(log)
            time.sleep(POLL_S)
        return code
    finally:
        end([child])
        _relay(log)


def _relay(log: int) -> None:
    """Print what has come to the log; the descriptor's own position is what was printed."""
    while text := os.read(log, 2**16):
        sys.stderr.write(text.decode(errors="replace"))
    sys.stderr.flush()


def _read(answer: dict[str, Any]) -> CheckedJob:
    """Return the result, or raise the error that the child met."""
    if error := answer.get("error"):
        if error["kind"] == "job":
            raise JobError(error["message"])
        if error["kind"] == "missing":
            raise ModuleNotFoundError(error["message"], name=error["name"])
        raise CheckFailed(error["message"])
    summary = records.from_dict(ModelSummary, answer["summary"])
    findings = tuple(records.from_dict(Finding, found) for found in answer["findings"])
    rest = answer["num_samples"], answer["lone_sample"]
    return CheckedJob(load_job(answer["job"]), summary, findings, *rest)


def main() -> None:
    """Check the job in the file of the first argument, and write the answer into the second."""
    # A coroutine in the place of a value is refused in our one line, beside which this would stand.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    answer: dict[str, Any]
    try:
        checked = look_at_job(load_job(json.loads(Path(sys.argv[1]).read_text())))
        answer = {
            "job": to_dict(checked.job),
            "summary": records.to_dict(checked.summary),
            "findings": [records.to_dict(found) for found in checked.findings],
            "num_samples": checked.num_samples,
            "lone_sample": checked.lone_sample,
        }
    except BaseException as error:
        if passes(error) and isinstance(error, SystemExit):
            raise
        found: dict[str, Any] = {"kind": kind_of(error), "message": text_of(error)}
        if isinstance(error, KeyboardInterrupt):  # by the user's code: Ctrl-C reaches the parent
            found = {"kind": "job", "message": f"the job's own code raised {tell_error(error)}"}
        elif isinstance(error, ModuleNotFoundError):
            found |= {"kind": "missing", "name": error.name}
        elif found["kind"] == "error" and not isinstance(error, CheckFailed):
            traceback.print_exc()
            found["message"] = f"checking the job: {tell_error(error)}"
        answer = {"error": found}
    Path(sys.argv[2]).write_text(json.dumps(answer))  # a file without a name


if __name__ == "__main__":
    main()
