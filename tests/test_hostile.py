"""The fuzzer of the command line (benchmarks/hostile.py): what it draws, and that it can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hostile import NAMES, draw, plan, read_rows, run_case, summarise
from benchmarks.hostile_cases import judge
from benchmarks.hostile_cases.case import SANDBOX, Case, lay_job, shown
from benchmarks.hostile_cases.flags import options, parameters
from tests.conftest import ROOT

LINE = "print('hybrid: --out = nowhere: no', file=sys.stderr); sys.exit(2)"
# What a program does wrongly, as Python, and a word of what is said about it.
FAULTS = {
    "a traceback": ("raise ValueError('x')", "a traceback"),
    "another status": ("print('hybrid: --out', file=sys.stderr); sys.exit(3)", "status 3, not 2"),
    "a wrong success": ("sys.exit(0)", "status 0, not 2"),
    "two lines": ("print('noise', file=sys.stderr); " + LINE, "2 lines, not one: noise"),
    "no line": ("sys.exit(2)", "0 lines, not one"),
    "a line that names nothing": (
        "print('hybrid: no', file=sys.stderr); sys.exit(2)",
        "does not say '--out'",
    ),
    "an escape": (r"print('hybrid: --out \x1b[31m', file=sys.stderr); sys.exit(2)", "control"),
    "a long line": ("print('hybrid: --out', 'x' * 9999, file=sys.stderr); sys.exit(2)",
                    "a line of"),
    "much CPU": ("import time\nwhile time.process_time() < 1: pass\n" + LINE, "s of CPU"),
    "a hang": ("import time; time.sleep(60)", "still runs after 2 s"),
    "a process": (
        "import subprocess as s; s.Popen(['sleep', '60'], start_new_session=True); " + LINE,
        "left running: sleep 60",
    ),
    "a changed file": ("open('mine.txt', 'a').write('x'); " + LINE, "changed: here/mine.txt"),
    "a removed file": ("import os; os.remove('../outside.txt'); " + LINE, "removed: outside.txt"),
    "a file of others in OUT": ("open('out/mine.txt', 'w'); " + LINE, "changed: here/out/mine.txt"),
    "a file elsewhere": ("open('record.json', 'w'); " + LINE,
                         "made outside --out: here/record.json"),
    "a temporary file": ("open('../tmp/x', 'w'); " + LINE, "left in TMPDIR: tmp/x"),
    "code that ran": (f"open('../{SANDBOX}', 'w'); " + LINE, "code was run"),
}  # fmt: skip
# Cases of seed 0 that broke the contract once, and are cheap.
MENDED = [("flags", 44), ("flags", 63), ("flags", 84), ("flags", 132), ("surroundings", 36)]


def lay(folder: Path) -> None:
    """A job, and a folder for results that has somebody's file."""
    lay_job(folder)
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    (folder / "out" / "record.json").write_text("{}")


def judged(code: str, folder: Path, limit_s: float = 30) -> list[str]:
    """What is said of a program in place of `hybrid`."""
    case = Case("planted", 0, "planted", ["train"], lay, words=("--out",), limit_s=limit_s)
    program = (sys.executable, "-S", "-c", "import sys; " + code)
    return judge.run(case, folder, ROOT, program, cpu_limit_s=0.4).problems


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "GRACE_S", 0.3)
    code, words = FAULTS[fault]
    found = judged(code, tmp_path / "case", 2 if fault == "a hang" else 30)
    assert any(words in problem for problem in found), found


def test_a_process_is_found_while_the_kernel_loads_its_program(tmp_path: Path) -> None:
    program = tmp_path / "sleep"
    shutil.copy(str(shutil.which("sleep")), program)
    missed = 0
    for _ in range(30):
        with program.open("rb") as file:  # so that it is read from the disk
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = subprocess.Popen([program, "60"], env={judge.MARK: "loading"})
        missed += started.pid not in dict(judge.marked("loading"))
        started.kill()
        started.wait()
    assert missed == 0


def test_a_right_end_passes(tmp_path: Path) -> None:
    ours = "open('out/record.json', 'w').write('[]'); open('out/job.json', 'w'); "
    assert judged(ours + LINE, tmp_path / "case") == []


def test_what_a_users_module_prints_is_the_users_as_it_is_and_no_more(tmp_path: Path) -> None:
    def said(text: str) -> list[str]:
        case = Case("planted", 0, "planted", ["train"], prints="\x1b[31mred")
        return judge.judge_words(case, 2, "", text + "hybrid: --out\n")[0]

    assert said("\x1b[31mred\n") == []
    assert "control characters" in said("\x1b[31mredder\n")[-1]
    assert "control characters" in said("\x1b[31m\n")[-1] and "2 lines" in said("red\n")[0]


def test_folders_on_the_way_to_the_results_may_be_made(tmp_path: Path) -> None:
    code = "import os; os.makedirs('a/b/c'); os.makedirs('a/b2'); open('a/x', 'w'); " + LINE
    case = Case("planted", 0, "planted", ["train"], out=("a/b/c",))
    program = (sys.executable, "-S", "-c", "import sys; " + code)
    found = judge.run(case, tmp_path / "case", ROOT, program).problems
    assert found == ["made outside --out: here/a/b2", "made outside --out: here/a/x"]


def test_cases_depend_on_their_seed_and_number_alone() -> None:
    first, again, other = (
        plan(520, 0, list(NAMES)),
        plan(520, 0, list(NAMES)),
        plan(520, 1, list(NAMES)),
    )

    def told(cases: list[Case]) -> list[object]:
        return [(c.name, c.what, c.arguments, c.shell, c.environment, c.ends) for c in cases]

    assert told(first) == told(again) != told(other)
    assert len(first) == 520 and all(sum(c.kind == k for c in first) > 25 for k in NAMES)
    assert told([draw(0, "runs", 7)]) == told([c for c in first if c.name == "runs:7"])


def test_every_command_and_option_is_tried() -> None:
    words = [[str(w) for w in c.arguments] for c in plan(400, 0, ["flags"])]
    assert {w[0] for w in words} >= set(parameters())
    tried = {(w[0], x.partition("=")[0]) for w in words for x in w if x.startswith("--")}
    valued = {(c, p.opts[0]) for c, p in options() if not p.is_flag and not p.hidden}
    assert valued <= tried, valued - tried


def test_a_few_real_cases_hold_and_are_kept_as_rows(tmp_path: Path) -> None:
    given = [c for c in plan(400, 3, ["flags"]) if c.what.endswith((" alone", "--nosuch"))]
    given = [c for c in given if c.arguments[0] in ("train", "check", "compare", "doctor")][:5]
    given += [c for c in plan(90, 3, ["jobs"]) if c.what.startswith("malformed")][:4]
    rows = [run_case(case, 3, ROOT, None) for case in given]
    mended = [draw(0, kind, number) for kind, number in MENDED]
    assert [run_case(case, 0, ROOT, None)["problems"] for case in mended] == [[]] * len(MENDED)
    assert [row["problems"] for row in rows] == [[]] * 9
    assert all(row["status"] == 2 and row["cpu_s"] < 2 for row in rows)
    page = summarise(rows, "command")
    assert "9 cases, seed 3: **0 break the contract**" in page and "Nothing broke it." in page
    (tmp_path / "cases.jsonl").write_text('{"kind": "flags"}\n{"kin')  # cut where it was stopped
    assert read_rows(tmp_path / "cases.jsonl") == [{"kind": "flags"}]


def test_what_a_line_must_show_of_a_value() -> None:
    assert (
        shown("a\x1b[31mred") == "31mred"
        and shown(b"\xff\xfe") == ""
        and shown("x" * 99) == "x" * 12
    )


def test_the_page_on_security_leads_to_what_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    assert links and all((ROOT / link).is_file() for link in links)
    assert "@" not in text  # no address that nobody reads
