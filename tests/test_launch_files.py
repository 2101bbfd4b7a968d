"""The files in launch/: scripts that a shell reads, configurations that say what their names say, a
manifest that its schema takes, a workflow whose steps run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import hybrid
from hybrid.strategies.registry import NAMES
from tests.conftest import ROOT
from tests.pages import environment, run_at_once

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
MODEL = """
import torch
from hybrid.models.losses import cross_entropy

def build():
    return [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)], cross_entropy
"""
DATA = """
import torch

def small():
    inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    samples = list(zip(inputs, inputs.argmax(1) % 3))
    return samples[:40], samples[40:]
"""


def document(file: str) -> Any:
    """A YAML file of launch/."""
    return yaml.safe_load((LAUNCH / file).read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_a_shell_reads_the_script(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in text and '"$@"' in text
    assert max(map(len, text.splitlines())) <= 100
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_values_of_a_script_can_be_set_before(script: Path) -> None:
    for name in ("JOB", "STRATEGY", "OUT"):
        assert re.search(rf"^{name}=\${{{name}:-\S+}}", script.read_text(), re.M), name


def test_batch_scripts_are_requeued_and_end_with_a_rank() -> None:
    for script in LAUNCH.glob("slurm/*.sbatch"):
        text = script.read_text()
        assert "\n#SBATCH --requeue\n" in text and "\n#SBATCH --open-mode=append\n" in text
        assert "\nexec srun -K1 " in text


def test_accelerate_configurations_differ_only_in_what_they_are_for() -> None:
    """accelerate.md runs those of ddp, fsdp and zero2."""
    files = sorted(file.stem for file in LAUNCH.glob("accelerate/*.yaml"))
    assert files == ["ddp", "fsdp", "hybrid_fsdp", "zero1", "zero2", "zero3"]
    for stage in (1, 3):
        same = document("accelerate/zero2.yaml") | {"deepspeed_config": {"zero_stage": stage}}
        assert document(f"accelerate/zero{stage}.yaml") == same
    degrees = {"dp_replicate": 2, "dp_shard": 2}
    parallel = {f"parallelism_config_{axis}_size": n for axis, n in degrees.items()}
    same = document("accelerate/fsdp.yaml") | {"num_processes": 4, "parallelism_config": parallel}
    assert document("accelerate/hybrid_fsdp.yaml") == same


def test_hostfile_is_one_that_deepspeed_and_open_mpi_read() -> None:
    lines = (LAUNCH / "hostfile").read_text().splitlines()
    hosts = [line for line in lines if not line.startswith("#")]
    assert len(hosts) == 2
    assert all(re.fullmatch(r"[\w.-]+ slots=\d+", line) for line in hosts)


def test_manifest_starts_a_job_and_says_that_it_was_not_run() -> None:
    file = "kubernetes/trainjob.yaml"
    assert (LAUNCH / file).read_text().startswith("# NOT RUN: ")
    trainer = document(file)["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "hybrid", "train"]
    job, option, strategy, *_ = trainer["args"]
    assert option == "--strategy" and strategy in NAMES
    hybrid.load_job(ROOT / job)


def test_manifest_fits_its_schema() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    kind = models.TrainerV1alpha1TrainJob
    manifest = document("kubernetes/trainjob.yaml")
    assert kind.from_dict(manifest).to_dict() == manifest, "a key that the schema does not know"
    typo = manifest["spec"]["trainer"] | {"numNode": 2}
    wrong = manifest | {"spec": manifest["spec"] | {"trainer": typo}}
    assert kind.from_dict(wrong).to_dict() != wrong


def test_manifest_gives_pods_no_more_than_training_needs() -> None:
    patch = document("kubernetes/trainjob.yaml")["spec"]["runtimePatches"][0]
    (nodes,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = nodes["template"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    user = str(pod["securityContext"]["runAsUser"])
    image = (LAUNCH / "container" / "Containerfile").read_text()
    assert f"\nUSER {user}\n" in image and f"--uid {user} " in image
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == mounted.keys()
    arguments = document("kubernetes/trainjob.yaml")["spec"]["trainer"]["args"]
    assert arguments[arguments.index("--out") + 1] in mounted.values()


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("ci/*.yml")), ids=lambda file: file.name)
def test_workflow_pins_its_actions_and_may_only_read(file: Path) -> None:
    workflow, text = yaml.safe_load(file.read_text()), file.read_text()
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in str(workflow["jobs"])
    assert "pull_request_target" not in text and "${{" not in text and "secrets" not in text
    used = [line for line in text.splitlines() if "uses:" in line]
    assert used
    for line in used:
        assert re.search(r"uses: actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line
    for step in (step for job in workflow["jobs"].values() for step in job["steps"]):
        if "actions/checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_image_is_said_not_to_be_built_and_installs_what_there_is() -> None:
    text = (LAUNCH / "container" / "Containerfile").read_text()
    assert text.startswith("# NOT BUILT HERE: ")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = re.findall(r"pip install .*'\.\[(.*)\]'", text)
    assert set(wanted.split(",")) <= set(extras["optional-dependencies"])
    assert re.search(r"^FROM \S+:\S+$", text, re.M), "an image without a release"


@pytest.mark.slow
def test_workflow_tests_a_model_of_one_s_own(tmp_path: Path) -> None:
    steps = {
        s["name"]: s for s in document("ci/smoke.yml")["jobs"]["strategies"]["steps"] if "name" in s
    }
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "model.py").write_text(MODEL)
    (tmp_path / "my_package" / "data.py").write_text(DATA)
    shutil.copy(LAUNCH / "ci" / "smoke.toml", tmp_path)
    said = run_at_once([steps["Compare"]["run"]], tmp_path, environment(tmp_path))
    assert "ddp, fsdp computed what single did" in said
    assert (tmp_path / steps["Keep the page"]["with"]["path"] / "report.html").exists()
