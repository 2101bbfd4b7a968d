"""What the tests share: small jobs, and running one comparison for many assertions."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid.launch.devices import HIDDEN
from hybrid.launch.garbage import RARELY

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "launch" / "jobs"

# What the tests claim, they claim of four ranks on the CPU: a host with GPUs, but fewer than four,
# would refuse them. `benchmarks/gpu.py` runs on a GPU, and `stub_cuda.py` plays some.
os.environ.update(HIDDEN)

# As in ranks (`launch/warm.py`): OpenMP's threads would spin on the cores that others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Python's own setting looks through all that torch and transformers made once for every few tests.
gc.set_threshold(*RARELY)

# torch's compiler would start processes that compile beside each rank, and these fill the cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Ranks import the tests' own models by `tests.workloads:...` from wherever they are started.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split()])

SMALL: dict[str, Any] = {
    "model": {"name": "mlp", "options": {"sizes": [32, 24, 16, 12, 10], "activation": "tanh"}},
    "data": {"name": "random", "options": {"samples": 100, "test_samples": 37, "features": 32}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 24, "micro_batches": 2, "steps": 6},
}


def small_job(**changes: Any) -> Any:
    """The small job (batches of 24 in 100 samples: the last of an epoch has 4) with changes, such
    as `train__steps=3` or `strategy__ddp={...}`."""
    import hybrid

    return hybrid.load_job(SMALL, {k.replace("__", "."): v for k, v in changes.items()})


def hybrid_command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `python -m hybrid ARGUMENTS` and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "hybrid", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def compare_by_command(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """`hybrid compare ... --json`: its exit status and result."""
    done = hybrid_command("compare", *arguments, "--out", str(out), "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def largest_differences(result: dict[str, Any], name: str) -> float:
    """Greatest relative loss difference of a strategy from `single` over all steps."""
    runs = result["strategies"]
    pairs = zip(runs[name]["steps"], runs["single"]["steps"], strict=True)
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)


@pytest.fixture(autouse=True)
def no_launcher_left_behind() -> Iterator[None]:
    """Variables that a test leaves would make commands of later tests think they are ranks: it
    fails, and they are taken back."""
    words = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "FSDP_", "OMP_NUM_THREADS")
    before = set(os.environ)
    yield
    left = sorted(key for key in os.environ.keys() - before if key.startswith(words))
    for key in left:
        del os.environ[key]
    assert not left, f"the test left {', '.join(left)} in the environment"


@pytest.fixture(scope="session", autouse=True)
def one_warm_process() -> Iterator[None]:
    """Fork the ranks of all runs that tests start by the Python API from one process."""
    from hybrid.launch.warm import warm_ranks

    with warm_ranks():
        yield


@pytest.fixture
def without_tryout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that this process starts are not tried out, so that a mistake comes up in training."""
    from hybrid.training.tryout import run

    monkeypatch.setattr(run, "try_out", lambda *_: run.Result(()))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
