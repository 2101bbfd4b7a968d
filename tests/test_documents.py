"""What README.md, CONTRIBUTING.md and docs/ name is there: paths, links, keys, commands, words."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import hybrid
from hybrid.cli import app
from hybrid.job.recovery import Guard
from hybrid.job.schema import Job, Variant
from hybrid.job.strategy_settings import Strategies
from hybrid.strategies import protocol, registry
from tests.conftest import ROOT
from tests.documents import (
    BLOCKS,
    DOCUMENTS,
    blocks,
    first_cells,
    links,
    page_text,
    rows,
    section,
    spans,
)
from tests.test_layering import ORDER

PAGES = [path for path in DOCUMENTS if path.name != "README.md"]
MORE = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "ds_configs" / "README.md"]
TREE = page_text("CONTRIBUTING.md")


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = page_text("README.md")
    assert len(text.splitlines()) <= 200
    table = links(section(text, "Where the rest is"))
    pages = [str(page.relative_to(ROOT)) for page in PAGES]
    assert sorted(table) == sorted([*pages, "CONTRIBUTING.md", "CHANGELOG.md"])


def test_the_picture_is_small() -> None:
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", page_text("README.md"))
    data = (ROOT / picture).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 150_000


def named_paths(page: Path) -> set[str]:
    """Paths that a document names, from the top folder on."""
    text = page.read_text()
    inside = page.parent.relative_to(ROOT)
    found = re.findall(r"`([\w.-]+/[\w./-]*)`", text)
    found += [str(inside / link) for link in links(text) if not link.startswith("http")]
    trees = [block.text for block in blocks([page]) if block.language == "text"]
    if page.name == "CONTRIBUTING.md":
        found += [line.split()[0] for tree in trees for line in tree.splitlines()]
    made = ("out/", "OUT/", ".venv/", "logs/", "checkpoints/", "tokens/s")
    return {path for path in found if not path.startswith(made) and "NAME" not in path}


@pytest.mark.parametrize("page", MORE, ids=lambda p: p.stem)
def test_paths_exist(page: Path) -> None:
    named = named_paths(page)
    assert len(named) > (10 if page.parent == ROOT else 0) or page.name in NO_PATHS
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


NO_PATHS = {"precision.md"}


def keys_of(kind: type[BaseModel], name: str = "") -> Iterator[tuple[str, str]]:
    """(section, key) of every value in the job, by the names that the file uses."""
    for attribute, field in kind.model_fields.items():
        key, inner = field.alias or attribute, field.annotation
        inner = next((one for one in get_args(inner) if one is Guard), inner)  # it may be left out
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys_of(inner, f"{name}.{key}".lstrip("."))
        elif name:  # else a section with names of the author's own
            yield name, key


def test_job_has_every_key_and_loads() -> None:
    (text,) = [b.text for b in BLOCKS if b.language == "toml" and b.page == "job-file.md"]
    assert text in section(page_text("docs/job-file.md"), "Every key")
    everything = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", text, flags=re.M))
    found = set()
    for name, key in keys_of(Job):
        values: Any = everything
        for part in name.split("."):
            values = values[part]
        assert key in values, f"{name}.{key} is not in the job of docs/job-file.md"
        found.add(name)
    sections = set(re.findall(r"^\[([\w.]+)\]", text, re.M))
    assert found == {s for s in sections if not s.startswith(("variant.", "proxy"))}
    job = hybrid.load_job(tomllib.loads(text))
    assert job.warnings() == [] and job.variant and job.proxy
    shown = {key for variant in everything["variant"].values() for key in variant}
    assert shown >= set(Variant.model_fields)
    assert job.strategy == Strategies(), "a value shown is not the default"


def test_tables_name_every_strategy_and_setting() -> None:
    text = section(page_text("README.md"), "Strategies")
    assert tuple(first_cells(text)) == registry.NAMES
    row_of = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    for name, key in keys_of(Job):
        strategy = name.removeprefix("strategy.")
        if strategy != name and key != "micro_batches":
            assert f"`{key}`" in row_of[strategy], f"{name}.{key} is not in its row"


def test_tables_name_every_command_and_exit_status() -> None:
    text = page_text("docs/commands.md")
    shown = {c.name or c.callback.__name__: c.hidden for c in app.registered_commands if c.callback}
    ours = {name for name, hidden in shown.items() if not hidden}
    cells = first_cells(section(text, "The commands"))
    assert {cell.split()[1] for cell in cells if cell.startswith("hybrid ")} == ours
    assert shown.keys() - ours == {"sample"} and "`hybrid sample` is its earlier name" in text
    assert re.findall(r"^\| (\d) \|", section(text, "Exit status"), re.M) == ["0", "1", "2", "3"]


def test_the_python_api_is_all_of_it() -> None:
    names = re.findall(r"`hybrid\.(\w+)", "\n".join(row[0] for row in rows(API)))
    assert sorted(names) == sorted(hybrid.__all__)


API = page_text("docs/python-api.md")


def test_a_strategy_of_ones_own_offers_what_the_protocol_says() -> None:
    table = rows(section(page_text("docs/bring-your-own.md"), "A strategy"))[1:]
    optional = {spans(row[0])[0].partition("(")[0]: "optional" in row[1] for row in table}
    assert {name for name, may in optional.items() if not may} == set(protocol.REQUIRED)
    more = {name for name, may in optional.items() if may}
    assert more == {"check", "steps_between_syncs"} and all(hasattr(protocol, n) for n in more)


def test_the_layers_have_every_package_once() -> None:
    table = rows(section(TREE, "How it is layered"))[1:]
    assert [row[0] for row in table] == [str(n + 1) for n in range(len(table))]
    assert len(table) <= 8
    named = [name for row in table for name in spans(row[1])]
    assert named == [unit for unit in ORDER if not unit.startswith("__")]
    assert {path.parent.name for path in (ROOT / "hybrid").glob("*/__init__.py")} <= set(named)


GLOSSARY = page_text("docs/glossary.md")
KEYS = {f"{name}.{key}" for name, key in keys_of(Job)}


def test_our_words_in_the_glossary_are_keys_of_the_job() -> None:
    dotted = re.compile(r"(model|data|optimizer|schedule|train|log|launch|parallel|strategy)\.")
    ours = {s for row in rows(GLOSSARY) for s in spans(row[-1]) if dotted.match(s)}
    assert len(ours) > 25 and not ours - KEYS
    strategies = {s for row in rows(GLOSSARY) for s in spans(row[-1]) if s in registry.NAMES}
    assert {"ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3"} <= strategies


def words_of(package: str, *files: str) -> set[str]:
    """The words in some files of an installed package, which is not imported."""
    (folder,) = importlib.util.find_spec(package).submodule_search_locations  # type: ignore
    texts = [(Path(folder) / file).read_text() for file in files]
    return {word for text in texts for word in re.findall(r"\w+", text)}


@pytest.mark.parametrize(
    ("title", "files"),
    [
        (
            "accelerate",
            "commands/launch.py accelerator.py data_loader.py local_sgd.py utils/random.py "
            "utils/dataclasses.py commands/config/cluster.py",
        ),
        (
            "DeepSpeed",
            "runtime/constants.py runtime/zero/config.py runtime/pipe/module.py "
            "runtime/precision_config.py",
        ),
    ],
)
def test_their_words_in_the_glossary_are_theirs(title: str, files: str) -> None:
    """Of the two that are installed."""
    cells = [row[0] for row in rows(section(GLOSSARY, title))[1:]]
    theirs = {word for cell in cells for span in spans(cell) for word in re.findall(r"\w+", span)}
    known = words_of(title.lower(), *files.split())
    assert len(theirs) > 10 and not sorted(theirs - known)
