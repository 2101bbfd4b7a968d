"""Which releases are installed, whether this toolkit was made for them, and which are known to be
wrong. Imports none of them."""

from __future__ import annotations

import operator
import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ..environment import package_version
from .finding import Finding

# The first good release, and what was wrong before.
KNOWN_WRONG = {
    "deepspeed": (
        "0.19.3",
        "pipelines that accumulate train on wrong gradients "
        "(deepspeedai/DeepSpeed#7773, #8152, mended by #8154)",
    ),
    "torch": ("2.10", "torch.load has known holes even with weights_only=True"),
}
COMPARISONS = {">=": operator.ge, "<": operator.lt}
Bounds = list[tuple[str, str]]  # such as (">=", "2.11")


def check_packages() -> Iterator[Finding]:
    """Python and every package that the toolkit needs."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    for name, bounds in required().items():
        yield judge(name, package_version(name), bounds)


def judge(name: str, installed: str | None, bounds: Bounds) -> Finding:
    """A package's release, None where it is not installed, against what is asked for."""
    wanted = ",".join(f"{sign}{release}" for sign, release in bounds)
    mend = f"pip install '{name}{wanted}'"
    if installed is None:
        return Finding(name, "error", f"not installed; needed: {wanted}", mend)
    first_good, problem = KNOWN_WRONG.get(name, ("0", ""))
    if numbers(installed) < numbers(first_good):
        found = f"{installed}: known to be wrong before {first_good}: {problem}"
        return Finding(name, "error", found, mend)
    broken = [sign for sign, b in bounds if not COMPARISONS[sign](numbers(installed), numbers(b))]
    if ">=" in broken:
        return Finding(name, "error", f"{installed}: too old; needed: {wanted}", mend)
    if broken:
        found = f"{installed}: newer than what this toolkit was tried with: {wanted}"
        return Finding(name, "warning", found, mend)
    return Finding(name, "ok", installed)


def required() -> dict[str, Bounds]:
    """What pyproject.toml asks for: the checkout's, where this is one, else the installed one's."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if file.exists():
        lines = tomllib.loads(file.read_text())["project"]["dependencies"]
    else:
        lines = [line for line in metadata.requires("hybrid") or [] if ";" not in line]
    bounds = re.compile(r"(>=|<)\s*([\w.]+)")
    return {re.split(r"[^\w.-]", line)[0]: bounds.findall(line) for line in lines}


def numbers(release: str) -> tuple[int, ...]:
    """A release to compare by: 2.13.0+cpu is (2, 13), and 2.14.0rc1 (2, 14), not tried either."""
    found = [int(n) for n in re.match(r"[\d.]*", release)[0].split(".") if n]  # type: ignore[index]
    while found and not found[-1]:
        found.pop()
    return tuple(found)
