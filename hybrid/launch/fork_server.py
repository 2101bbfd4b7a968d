"""This module is the warm process, which imports what ranks need once and forks them.

`hybrid.launch.warm` starts it and sends requests over a socket, each a JSON object. It answers with
the process id of each rank that it forked and, later, with the rank's exit status. A rank runs the
same program as one that is started afresh, with the same variables, log and process group, and its
command line shows it in `ps` in the same way. The process ends when its starter does, and the
kernel then ends the ranks."""

import atexit
import contextlib
import ctypes
import gc
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from .garbage import collect_as_usual, collect_rarely
from .held_port import VARIABLE
from .interpreter import start_words
from .orphans import end_with_parent

LOOK_S = 1.0  # between looks at whether the starter lives
MESSAGE_BYTES = 2**17


def main() -> None:
    """Serve requests until the starter ends; return never."""
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(control: socket.socket, here: bool = False) -> None:
    """Serve requests until the starter ends; return never.

    here: this process is a fork of its starter (`hybrid.launch.fork_here`), whose `__main__`, path
    and streams ranks would otherwise have."""
    words = os.memfd_create("words")  # what imports print belongs into each rank's log
    os.dup2(words, 1)
    os.dup2(words, 2)
    if here:
        sys.stdout, sys.stderr = _unbuffered(sys.stdout, 1), _unbuffered(sys.stderr, 2)
    code = _run(_serve(control, words), here)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # taking down the imported libraries one by one takes 0.3 s


def _serve(control: socket.socket, words: int) -> dict[str, Any]:
    """Fork a rank for each request, and report exits. Return in a rank alone, with its request."""
    parent, woken = os.getppid(), _wake_on_exits()
    while True:
        ready, _, _ = select.select([control.fileno(), woken], [], [], LOOK_S)
        if os.getppid() != parent:
            os._exit(0)
        if woken in ready:
            os.read(woken, 1024)
            _report_exits(control)
        if control.fileno() in ready:
            message, passed, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
            if not message:
                os._exit(0)
            request = json.loads(message)
            _import(request["modules"])
            if "program" not in request:
                continue
            server, child = os.getpid(), _fork()
            if child == 0:
                control.close()
                if passed:
                    request["variables"][VARIABLE] = str(passed[0])
                _become_rank(request, server, words)
                return request
            for descriptor in passed:
                os.close(descriptor)
            control.send(json.dumps({"pid": child}).encode())


def _wake_on_exits() -> int:
    """Return a descriptor that can be read when a rank has ended."""
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return read


def _report_exits(control: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError, BrokenPipeError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            control.send(json.dumps({"pid": ended[0], "code": code}).encode())


_imported = set[str]()


def _import(names: Sequence[str]) -> None:
    """Import modules once, and call `function` once where a name is `module:function`.

    What fails here fails in the rank too, which says why."""
    new = [name for name in names if name not in _imported]
    collect_rarely()
    for name in new:
        _imported.add(name)
        with contextlib.suppress(Exception):
            found = pkgutil.resolve_name(name)
            if ":" in name:
                found()
    collect_as_usual()
    if new:
        gc.collect()
        gc.freeze()  # ranks then neither look through these objects nor copy their pages


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def _become_rank(request: dict[str, Any], server: int, words: int) -> None:
    """Give this forked process all that a process of its own would have."""
    os.setsid()  # Ctrl-C reaches the command alone, which ends the ranks
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_with_parent(server)
    os.environ.update(request["variables"])
    os.chdir(request["folder"])
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND
    if not request["log"].startswith("/proc/"):  # of a file without a name
        flags |= os.O_NOFOLLOW
    log = os.open(request["log"], flags, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    for descriptor in (log, nothing):
        os.close(descriptor)
    os.write(1, os.pread(words, os.fstat(words).st_size, 0))
    os.close(words)
    sys.stdout, sys.stderr = _unbuffered(sys.stdout, 1), _unbuffered(sys.stderr, 2)
    command = [*request["program"], *request["arguments"]]
    _show_command([sys.executable, *command])
    if reason := _why_not_forked():
        print(f"hybrid: this rank starts afresh: {reason}", file=sys.stderr)
        program = start_words([sys.executable, *request["program"]])
        os.execv(sys.executable, [*program, *request["arguments"]])
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()  # else all ranks would draw the same; Python's own module does this
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # OpenMP has read it before
    _leave_to_parent()


def _leave_to_parent() -> None:
    """Have the end of this process finalize nothing that the parent made, and still uses.

    Else each rank takes torch's libraries of operators apart, in a copy of their memory, and would
    remove a temporary folder of the parent."""
    for finalizer in tuple(getattr(weakref.finalize, "_registry", ())):
        finalizer.atexit = False


def _unbuffered(stream: TextIO, descriptor: int) -> TextIO:
    """Return a stream like Python's own, which keeps nothing back: PYTHONUNBUFFERED."""
    raw: Any = io.FileIO(descriptor, "w", closefd=False)
    encoding = getattr(stream, "encoding", None) or "utf-8"  # a notebook's own has none
    errors = getattr(stream, "errors", None) or "backslashreplace"
    return io.TextIOWrapper(raw, encoding, errors, write_through=True)


def _why_not_forked() -> str:
    """Return why this process may not go on as a fork, empty if it may."""
    cuda = sys.modules.get("torch.cuda")
    if cuda and cuda._is_in_bad_fork():
        return "an imported module has used the GPU"
    return ""


def _show_command(words: Sequence[str]) -> None:
    """Make `ps` and /proc/PID/cmdline show these words, which a fork otherwise has of its parent.

    The kernel reads them from where it laid the server's own, which end in a long filler
    (proc(5), /proc/pid/stat: arg_start, arg_end)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # fields 48 and 49; the first here is the third
    text = b"\0".join(map(os.fsencode, words)) + b"\0"
    if start and len(text) <= end - start:
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _run(request: dict[str, Any], here: bool) -> int:
    """Run the rank's program as Python's command line would, and return its exit status.

    here: `__main__` and the path stay those of the process that this one is a fork of."""
    program, arguments = request["program"], request["arguments"]
    try:
        if program[0] == "-m":
            if here or not hasattr(sys.modules.get(program[1]), "__path__"):
                sys.modules.pop(program[1], None)  # else runpy warns that it runs it again
            if not here and not sys.flags.safe_path:
                sys.path[0] = os.getcwd()
            sys.argv = ["", *program[2:], *arguments]
            runpy.run_module(program[1], run_name="__main__", alter_sys=not here)
        else:
            folder = str(Path(program[0]).resolve().parent)
            sys.path[: not sys.flags.safe_path] = [folder]
            sys.argv = [*program, *arguments]
            runpy.run_path(program[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = _status(error)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


def _status(error: SystemExit) -> int:
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
        return 1
    return error.code or 0


if __name__ == "__main__":
    main()
