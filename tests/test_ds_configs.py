"""DeepSpeed's configurations: which keys are known, and that plain DeepSpeed takes our files."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.engines.deepspeed_config import KEYS_FILE, NOT_HERE, check_ds_config, load_ds_config
from hybrid.job.errors import JobError
from hybrid.launch.placement import Placement
from hybrid.layout import Layout
from hybrid.models import build_model
from tests import deepspeed_keys
from tests.conftest import ROOT, small_job
from tests.ports import free_port

README = (ROOT / "ds_configs" / "README.md").read_text()
COMMANDS = re.findall(r"^deepspeed .*", README, re.M)
NAMES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    found = deepspeed_keys.text()
    assert KEYS_FILE.read_text() == found, "run: python -m tests.deepspeed_keys"


def samples(known: dict[str, Any]) -> Iterator[Any]:
    """Values that a row of the table allows."""
    least = known.get("minimum", known.get("exclusiveMinimum", 0))
    whole = max(1, int(least) + ("exclusiveMinimum" in known))
    values = {"boolean": True, "integer": whole, "number": float(least) or 0.5, "string": "auto"}
    for kind in known.get("type", []):
        yield from known.get("enum") or [values.get(kind, {"array": [], "object": {}}.get(kind))]


def leaves(section: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Path and row of each value in the table."""
    for name, known in section["properties"].items():
        yield (*path, name), known
        if "properties" in known:
            yield from leaves(known, (*path, name))


# DeepSpeed takes certain texts alone here, and says so itself when it starts; or a GPU is needed.
CHOICES = {
    "seq_parallel_communication_data_type",
    "gradient_allreduce_op",
    "checkpoint.tag_validation",
    "checkpoint.writer.type",
    "aio.use_gds",
}


def test_deepspeed_takes_what_the_table_allows() -> None:
    """Each value alone, since not all go together; under ZeRO-3, which takes the most."""
    from deepspeed.runtime.config import DeepSpeedConfig

    table = json.loads(KEYS_FILE.read_text())
    wrong, tried = {}, 0
    for path, known in leaves(table):
        for value in samples(known):
            config: Any = value
            for name in reversed(path):
                config = {name: config}
            if path[0] == "zero_optimization" and isinstance(config[path[0]], dict):
                config[path[0]].setdefault("stage", 3)
            tried += 1
            try:
                DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1} | config)
            except Exception as error:
                wrong[".".join(path)] = f"{value!r}: {error}"
    assert tried > 150 and set(wrong) <= CHOICES, wrong


FULL = {
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": 5e7,
        "overlap_comm": None,
        "offload_optimizer": {"device": "cpu", "ratio": 1},
    },
    "activation_checkpointing": {"number_checkpoints": 4, "profile": False},
    "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
    "flops_profiler": {"profile_step": 2, "output_file": None},
    "wall_clock_breakdown": True,
}


def test_a_file_with_much_in_it_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "full.json"
    file.write_text(json.dumps(FULL))
    assert load_ds_config(str(file), 2) == FULL
    check_ds_config(small_job(strategy__zero2__ds_config=str(file)), "zero2")
    with pytest.raises(JobError, match=r"zero_optimization.stage = 2: this strategy needs 3"):
        check_ds_config(small_job(strategy__zero3__ds_config=str(file)), "zero3")


@pytest.mark.parametrize(("name", "stage"), [("pipeline", 0), ("2d", 1)])
def test_timers_that_stop_a_pipeline_are_refused(name: str, stage: int, tmp_path: Path) -> None:
    file = tmp_path / "timers.json"
    config = {"zero_optimization": {"stage": stage}, "wall_clock_breakdown": True}
    file.write_text(json.dumps(config))
    job = small_job(**{f"strategy__{name}__ds_config": str(file)})
    with pytest.raises(JobError, match=r"wall_clock_breakdown = true: .*valid: false"):
        check_ds_config(job, name)
    file.write_text(json.dumps(config | {"wall_clock_breakdown": False}))
    check_ds_config(job, name)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_a_users_file_stay_and_overlap_follows_the_device(
    name: str, tmp_path: Path
) -> None:
    """The shipped files' sizes are cut to the model; overlap is for GPUs, which a stub shows."""
    from hybrid.engines.deepspeed_setup import full_config

    model, _ = build_model(small_job())
    stage = {"zero1": 1, "zero2": 2, "zero3": 3, "pipeline": 0, "2d": 1}[name]
    layout = (
        Layout(pp=2, dp=2, replicate=2) if stage == 0 or name == "2d" else Layout(dp=4, shard=4)
    )
    sizes = {"reduce_bucket_size": 3 * 10**8 + 1, "allgather_bucket_size": 4 * 10**8}
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **sizes}}))
    for kind in ("cpu", "cuda"):
        here = OnDevice(0, 4, layout=layout, device_asked=kind)
        for precision in ("fp32", "bf16"):
            job = small_job(train__precision=precision)
            zero = full_config(job, here, model, name, stage)["zero_optimization"]
            assert zero["reduce_bucket_size"] <= 2**18
            assert zero["overlap_comm"] == (kind == "cuda" and layout.pp == 1)
            job = small_job(
                train__precision=precision, **{f"strategy__{name}__ds_config": str(file)}
            )
            zero = full_config(job, here, model, name, stage)["zero_optimization"]
            assert {key: zero[key] for key in sizes} == sizes
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": True}}))
    here = OnDevice(0, 4, layout=layout, device_asked="cpu")
    assert full_config(job, here, model, name, stage)["zero_optimization"]["overlap_comm"] is True
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "allgather_bucket_size": 7}}))
    with pytest.raises(JobError, match=r"allgather_bucket_size = 7: valid: an even number"):
        check_ds_config(job, name)


class OnDevice(Placement):
    """A rank with the device that it asks for, on a machine without a GPU."""

    @property
    def device(self) -> torch.device:
        """The device, which nothing is put on."""
        return torch.device(self.device_asked)


@pytest.mark.parametrize("stage", [0, 1])
def test_2d_needs_the_stage_that_its_job_says(stage: int, tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1 - stage}}))
    job = small_job(strategy__2d={"zero_stage": stage, "ds_config": str(file)})
    with pytest.raises(JobError, match=f"stage = {1 - stage}: this strategy needs {stage}"):
        check_ds_config(job, "2d")


@pytest.mark.parametrize("key", NOT_HERE)
def test_what_the_toolkit_does_itself_is_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps({key: True}))
    with pytest.raises(JobError, match=f"{key}: may not be set: {NOT_HERE[key]}"):
        load_ds_config(str(file), 0)


def test_the_commands_name_every_file() -> None:
    named = [re.findall(r"ds_configs/(\w+)\.json", command) for command in COMMANDS]
    assert sorted(named) == [[name] for name in NAMES]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_plain_deepspeed_takes_a_file_as_it_is(name: str) -> None:
    (command,) = (c for c in COMMANDS if f"/{name}.json" in c)
    launcher, *words = shlex.split(command)
    done = subprocess.Popen(
        [Path(sys.executable).parent / launcher, "--master_port", str(free_port()), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path_with_ours()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = done.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGKILL)
        raise
    assert done.returncode == 0, output[-4000:]
    first, last = (float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", output, re.M))
    assert last < first / 5


def path_with_ours() -> str:
    """PATH with this environment's programs first, as after activating it."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
