"""Runs the command of a case in a folder of its own, and says what breaks the contract."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from .case import MINE, SANDBOX, Case, Word

MARK = "HYBRID_HOSTILE_CASE"  # a variable that every process of a case inherits
CPU_LIMIT_S = 2.0
MEMORY_KIB = 6 * 2**20  # of a process, so that no case takes the whole machine
MOST_PROCESSES = 100  # more than a case of a few ranks and their helpers can need
LONGEST = 3000  # characters of the line on what is wrong
GRACE_S = 4.0
LOADING_S = 2.0  # more than the kernel takes to load a program
LOADED_S = 0.02  # and from its command line to its variables
# What hybrid itself writes into the folder for the results, and so may write again.
OURS = re.compile(
    r"(?:[^/]+/)?(?:(?:job|record|compare|eval|session|status|plan)\.json|steps\.jsonl|compare\.md|"
    r"report\.html|\.?[a-z.]*lock|logs/rank\d+\.(?:log|where|error|json)|checkpoints/.*)"
)
TORCHS = re.compile(r"tmp/torchinductor_")  # a cache that torch makes and keeps there
NOISE = ("hybrid: warning: ",)  # lines that may stand beside the one on what is wrong
PROGRAM = (sys.executable, "-m", "hybrid")


@dataclasses.dataclass
class End:
    """Is how a command ended. line: the last one of ours. problems: what breaks the contract."""

    status: int
    cpu_s: float
    wall_s: float
    line: str
    problems: list[str]


def run(
    case: Case, folder: Path, tree: Path, program: Sequence[str] = PROGRAM,
    cpu_limit_s: float = CPU_LIMIT_S,
) -> End:  # fmt: skip
    """Run a case in a folder that does not exist yet, and judge it. tree: the checkout to try."""
    here = folder / "here"
    for path in (here, folder / "tmp", folder / "home"):
        path.mkdir(parents=True)
    (folder / "outside.txt").write_text(MINE)
    case.make(here)
    before = dict(snapshot(folder))
    mark = f"{os.getpid()}-{case.name}-{time.monotonic_ns()}"
    began, baseline = time.monotonic(), _num_processes()
    child = _start(case, folder, tree, program, mark)
    status, cpu_s, problems = _wait(child, case, mark, baseline)
    wall_s = time.monotonic() - began
    problems += [f"left running: {words}" for words in _left(mark, GRACE_S)]
    problems += changes(before, dict(snapshot(folder)), case)
    texts = [(folder / f"std{x}").read_bytes().decode(errors="replace") for x in ("out", "err")]
    found, line = judge_words(case, status, *texts)
    problems += found
    if not case.starts and status == 2 and cpu_s > cpu_limit_s:
        problems.append(f"{cpu_s:.1f} s of CPU before it was refused")
    return End(status, round(cpu_s, 2), round(wall_s, 2), line, problems)


def environment_of(case: Case, folder: Path, tree: Path, mark: str) -> dict[bytes, bytes]:
    """Return the variables of a case's command."""
    keep = ("PATH", "LD_LIBRARY_PATH", "LANG", "VIRTUAL_ENV")
    found: dict[str, Word | None] = {k: os.environ[k] for k in keep if k in os.environ}
    found |= {
        "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"), MARK: mark, "SANDBOX": str(folder),
    }  # fmt: skip
    found |= case.environment
    return {os.fsencode(k): os.fsencode(v) for k, v in found.items() if v is not None}


def shell_line(case: Case, program: Sequence[str] = PROGRAM) -> str:
    """Return a case's command as bash takes it, behind its surroundings."""
    words = [f"$'{_escaped(w)}'" if _is_odd(w) else shlex.quote(str(w)) for w in case.arguments]
    before = f"{case.shell}; " if case.shell else ""
    return f"{before}exec {shlex.join(program)} {' '.join(words)}"


def _is_odd(word: Word) -> bool:
    return isinstance(word, bytes) or not word.isprintable() or not word.isascii()


def _escaped(word: Word) -> str:
    return "".join(f"\\x{b:02x}" for b in os.fsencode(word))


def _start(case: Case, folder: Path, tree: Path, program: Sequence[str], mark: str) -> Popen[bytes]:
    before = f"ulimit -c 0; ulimit -d {MEMORY_KIB}; cd here; " + (
        f"{case.shell}; " if case.shell else ""
    )
    words = ["bash", "-c", f'{before}exec "$@"', "bash", *program, *case.arguments]
    variables = environment_of(case, folder, tree, mark)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        return Popen(
            [os.fsencode(w) for w in words], env=variables, cwd=folder, stdin=DEVNULL,
            stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip


def _wait(
    child: Popen[bytes], case: Case, mark: str, baseline: int
) -> tuple[int, float, list[str]]:
    """Wait for a command's end; return its status, the CPU time of its tree, and what is wrong."""
    deadline, problems = time.monotonic() + case.limit_s, list[str]()
    while True:
        pid, code, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(code)
            return child.returncode, used.ru_utime + used.ru_stime, problems
        if not problems and time.monotonic() > deadline:
            problems.append(f"still runs after {case.limit_s:.0f} s")
        if not problems and _num_processes() > baseline + MOST_PROCESSES:
            many = len(list(marked(mark)))
            problems += [f"started {many} processes"] if many > MOST_PROCESSES else []
        if problems:
            kill(mark)
        time.sleep(0.03)


def _num_processes() -> int:
    return sum(name.isdigit() for name in os.listdir("/proc"))


def marked(mark: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the command line of each process of a case."""
    sought = f"{MARK}={mark}".encode()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if sought in _environment(Path(f"/proc/{name}")).split(b"\0"):
                    words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                    yield int(name), b" ".join(words[:6]).decode(errors="replace")[:120]
            except OSError:
                continue


def _environment(process: Path) -> bytes:
    """Return the variables of a process in /proc; raises OSError for one that has ended.

    While the kernel loads a program, from a slow disk for milliseconds, it has none. Of a loaded
    one the kernel makes the command line known first (Linux's `create_elf_tables`), so that one
    without variables has none a moment later either."""
    deadline = time.monotonic() + LOADING_S
    while not (found := (process / "environ").read_bytes()) and time.monotonic() < deadline:
        os.readlink(process / "exe")  # raises OSError where there is no program
        if (process / "cmdline").read_bytes():
            deadline = min(deadline, time.monotonic() + LOADED_S)
        time.sleep(0.001)
    return found


def kill(mark: str) -> None:
    """Kill every process of a case."""
    for pid, _ in list(marked(mark)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _left(mark: str, seconds: float) -> list[str]:
    """Return the processes that are still there after a moment to end, and kill them."""
    deadline = time.monotonic() + seconds
    while (there := [words for _, words in marked(mark)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    kill(mark)
    return there


def snapshot(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield what each path in a folder is: its kind, its rights and what it holds."""
    for base, folders, names in os.walk(os.fsencode(folder)):
        for name in folders + names:
            path = os.path.join(base, name)
            about, held = os.lstat(path), ""
            if stat.S_ISREG(about.st_mode) and about.st_size < 2**22:
                with open(path, "rb") as file:
                    held = hashlib.sha256(file.read()).hexdigest()
            elif stat.S_ISLNK(about.st_mode):
                held = os.fsdecode(os.readlink(path))
            size = 0 if stat.S_ISDIR(about.st_mode) else about.st_size
            yield (
                os.fsdecode(os.path.relpath(path, os.fsencode(folder))),
                (about.st_mode, size, held),
            )


def changes(before: Mapping[str, Any], after: Mapping[str, Any], case: Case) -> list[str]:
    """Return what a command changed, made, removed or left where it may not."""
    found = [f"code was run: {path}" for path in after if SANDBOX in path and path not in before]
    made = sorted(after.keys() - before.keys())
    found += [f"left in TMPDIR: {p}" for p in made if p.startswith("tmp/") and not TORCHS.match(p)]
    roots = [os.path.normpath(os.path.join("here", root)) for root in case.out]
    for path in sorted(before.keys() | after.keys()):
        if path.startswith(("tmp/", "home/.cache", "std")) or SANDBOX in path:
            continue
        root = next((r for r in roots if path == r or path.startswith(f"{r}/")), None)
        ours = root is not None and OURS.fullmatch(os.path.relpath(path, root))
        ours = ours and path not in [f"here/{name}" for name in case.guarded]
        if path not in after and not ours:
            found.append(f"removed: {path}")
        elif path not in before and any(r.startswith(f"{path}/") for r in roots):
            if not stat.S_ISDIR(after[path][0]):
                found.append(f"made on the way to --out, and no folder: {path}")
        elif path not in before and root is None:
            found.append(f"made outside --out: {path}")
        elif path in before and path in after and before[path] != after[path] and not ours:
            found.append(f"changed: {path}")
    return [os.fsencode(text).decode(errors="backslashreplace") for text in found]


def judge_words(case: Case, status: int, out: str, err: str) -> tuple[list[str], str]:
    """Return what is wrong with the status and with what was printed, and the line of ours."""
    problems = []
    out, err = (_without(case.prints, text) for text in (out, err))
    if status not in case.ends:
        problems.append(f"status {status}, not {' or '.join(map(str, sorted(case.ends)))}")
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith(NOISE)]
    ours = [line for line in lines if line.startswith("hybrid: ")]
    line = ours[-1] if status and ours else ""
    if "Traceback (most recent" in out + err and not (case.own_code and status == 1):
        problems.append(f"a traceback: {lines[-1][:200] if lines else ''}")
    elif status in (2, 3) and "2>" not in case.shell:
        if len(lines) != 1 or not ours:
            beside = [x for x in lines if x not in ours[-1:]]
            problems.append(
                f"{len(lines)} lines, not one: {' | '.join(x[:150] for x in beside[:3])}"
            )
        wanted = [w for w in case.words if not any(x in line for x in w.split("|"))]
        problems += [f"does not say {word!r}" for word in wanted if ours]
    if len(line) > LONGEST:
        problems.append(f"a line of {len(line)} characters")
    if any(c in out + err for c in ("\x1b", "\0", "\x07")):
        problems.append("control characters on the terminal")
    return problems, line[:400]


def _without(line: str, text: str) -> str:
    """Return a text without a line of the user's own, wherever it stands whole and as it is."""
    return "\n".join(x for x in text.split("\n") if not line or x != line)


def clear(folder: Path) -> None:
    """Remove the folder of a case, whatever it holds."""
    shutil.rmtree(os.fsencode(folder), ignore_errors=True)
