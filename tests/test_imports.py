"""What costs nothing until it is used: torch is imported by the commands that train, no others."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from tests.conftest import JOBS, ROOT

HEAVY = ("torch", "accelerate", "deepspeed", "transformers", "safetensors", "numpy", "plotly")
HELP_CPU_S = 0.3
COMMAND = "import sys; sys.argv = ['hybrid', {words}]; from hybrid.cli import main\ntry: main()\n"
COMMAND += "except SystemExit as end: assert end.code == 0, end.code"


def run_python(code: str) -> str:
    """What a fresh interpreter prints, on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import hybrid",
        f"import hybrid; hybrid.load_job({str(JOBS / 'mnist.toml')!r}, ['train.steps=20'])",
        "import hybrid.comparison.session",
        "from hybrid.strategies import registry; [registry.get(n) for n in registry.NAMES]",
        COMMAND.format(words="'--help'"),
        COMMAND.format(words="'train', '--help'"),
        COMMAND.format(words="'strategies'"),
        COMMAND.format(words="'strategies', '--json'"),
    ],
)
def test_costs_no_torch(code: str) -> None:
    loaded = run_python(
        f"{code}\nimport sys\nprint('loaded:', *sorted(sys.modules), file=sys.stderr)"
    )
    modules = loaded.rpartition("loaded:")[2].split()
    assert "sys" in modules
    assert not set(HEAVY) & set(modules)


def test_help_is_quick() -> None:
    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "hybrid", "--help"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "0"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(3)) < HELP_CPU_S


@pytest.mark.parametrize("first", ["hybrid.training.loop", "hybrid.comparison.session"])
def test_functions_stay_functions_when_their_files_are_imported(first: str) -> None:
    code = (
        f"import {first}, hybrid.training.loop, hybrid.comparison.session, hybrid\n"
        "homes = {'train': hybrid.training.loop, 'compare': hybrid.comparison.session}\n"
        "for name, module in homes.items():\n"
        "    assert getattr(hybrid, name) is getattr(module, name), name\n"
        "    assert callable(getattr(hybrid, name)), name\n"
        "from hybrid import train, compare\n"
        "print(train.__qualname__, compare.__qualname__)"
    )
    assert run_python(code).split() == ["train", "compare"]


def test_every_public_name_is_there_and_no_other() -> None:
    import hybrid

    for name in hybrid.__all__:
        assert callable(getattr(hybrid, name)), name
    with pytest.raises(AttributeError, match="'hybrid' has no attribute 'trian'"):
        _ = hybrid.trian
