"""Every command in the launchers' pages runs: here, or where ELSEWHERE says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.pages import PAGES, blocks, environment, record_of, run_at_once

ELSEWHERE = ("in SLURM", "over ssh")  # in test_slurm.py and test_several_hosts.py
LAUNCHERS = {"torchrun", "accelerate", "deepspeed", "slurm", "mpi"}


def runs() -> Iterator[Any]:
    """Commands that run together, and the program that they need."""
    for page, how, commands in blocks():
        if how in ELSEWHERE:
            continue
        groups = [commands] if how == "at once" else [[command] for command in commands]
        for group in groups:
            needs = how.removeprefix("needs ") if how.startswith("needs ") else None
            yield pytest.param(group, needs, id=f"{page}-{group[0]}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("commands", "needs"), list(runs()))
def test_commands_run(commands: list[str], needs: str | None, tmp_path: Path) -> None:
    if needs and not shutil.which(needs):
        pytest.skip(f"not installed: {needs}")
    here = [command.replace("node1", "localhost") for command in commands]
    hosts = tmp_path / "hosts"  # that are this machine
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    several = {"HOSTFILE": str(hosts)} if len(commands) > 1 else {}
    said = run_at_once(here, tmp_path, environment(tmp_path, **several))
    record = record_of(tmp_path)
    assert (record["status"], record["world_size"]) == ("ok", 2), said
    assert record["receipt"]["engaged"]
    assert f"{record['strategy']}: {len(record['steps'])} steps, loss" in said


def test_there_is_a_page_for_each_launcher_and_each_is_short() -> None:
    assert {page.stem for page in PAGES} == LAUNCHERS | {"README"}
    for page in PAGES:
        assert len(page.read_text().splitlines()) < 80, page
    entry = (ROOT / "launch" / "README.md").read_text()
    assert all(f"({name}.md)" in entry for name in LAUNCHERS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_tells_what_people_ask(page: Path) -> None:
    if page.stem in LAUNCHERS:
        found = re.findall(r"^## (.*)$", page.read_text(), re.M)
        assert found == ["One host", "Several hosts", "How it ends", "What is refused", "Logs"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_say_how_they_run(page: Path) -> None:
    fences = re.findall(r"^```(.+)$", page.read_text(), re.M)
    known = r"bash( at once| in SLURM| over ssh| needs \S+)?|text"
    assert fences or page.stem == "README"
    assert not [fence for fence in fences if not re.fullmatch(known, fence)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_it_names_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"\b((?:launch|hybrid|tests|benchmarks|ds_configs)/[\w./-]*\w)", text)
    links = [str(Path("launch") / link) for link in re.findall(r"\]\(([\w./-]+)\)", text)]
    assert not [path for path in [*named, *links] if not (ROOT / path).exists()]


def test_every_script_is_run_by_a_command() -> None:
    run = " ".join(command for block in blocks() for command in block.commands)
    scripts = [file for end in ("sh", "sbatch") for file in (ROOT / "launch").rglob(f"*.{end}")]
    assert len(scripts) == 12
    assert not [file.name for file in scripts if str(file.relative_to(ROOT)) not in run]
