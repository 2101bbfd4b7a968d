"""Ranks that hybrid starts inside a launcher or an allocation have nothing of it; four ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from hybrid.job.errors import JobError
from hybrid.launch.environment import VARIABLES, without_launcher
from hybrid.launch.local import run_ranks
from hybrid.launch.placement import Placement, set_apart
from hybrid.launch.warm import warm_ranks
from hybrid.training.run import run_job
from tests.conftest import small_job

# Of torchrun with one process, in the shell of salloc, as a rank of both kinds of MPI.
SURROUNDING = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_RANK": "0", "ROLE_WORLD_SIZE": "1"},
    **{"ROLE_NAME": "default", "NODE_RANK": "0", "MASTER_ADDR": "elsewhere.invalid"},
    **{"MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    **{"TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_RUN_ID": "none"},
    **{"TORCHELASTIC_ERROR_FILE": "/nowhere/error.json"},
    **{"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "1"},
    **{"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": "1"},
    **{"PARALLELISM_CONFIG_TP_SIZE": "2", "MEGATRON_LM_TP_DEGREE": "2"},
    **{"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    **{"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "7"},
    **{"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_PTY_PORT": "4"},
    **{"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_UNIVERSE_SIZE": "1"},
    **{"PMIX_RANK": "0", "PMIX_NAMESPACE": "1@1", "PMI_RANK": "0", "PMI_SIZE": "1"},
    **{"PMI_FD": "9", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
}
SETTINGS = {"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "lo", "TORCH_NCCL_BLOCKING_WAIT": "1"}
SETTINGS |= {"CUDA_VISIBLE_DEVICES": "", "OMPI_MCA_btl": "tcp"}
OF_THE_JOB = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5", "SLURM_TMPDIR": "/tmp"}
RANKS = 4
SCRIPT = """
import json, os, sys
json.dump(dict(os.environ), open(sys.argv[1] + os.environ["RANK"], "w"))
"""


@pytest.fixture
def surrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (SURROUNDING | SETTINGS | OF_THE_JOB).items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize("fresh", [True, False], ids=["afresh", "forked"])
def test_no_variable_of_a_launcher_reaches_a_rank(
    fresh: bool, surrounded: None, tmp_path: Path
) -> None:
    (tmp_path / "show.py").write_text(SCRIPT)
    with warm_ranks(fresh):
        program = (sys.executable, str(tmp_path / "show.py"))
        run_ranks(RANKS, [f"{tmp_path}/seen"], tmp_path, program=program)
    for rank in range(RANKS):
        seen = json.loads((tmp_path / f"seen{rank}").read_text())
        assert (seen["RANK"], seen["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"]) == (str(RANKS), str(RANKS))
        assert seen["MASTER_ADDR"] != SURROUNDING["MASTER_ADDR"] and seen["MASTER_PORT"] != "1"
        ours = {*VARIABLES["torchrun"], "MASTER_ADDR", "MASTER_PORT"}
        assert not (SURROUNDING.keys() - ours) & seen.keys()
        assert {key: seen.get(key) for key in SETTINGS | OF_THE_JOB} == SETTINGS | OF_THE_JOB


def test_srun_in_an_allocation_keeps_what_it_needs(surrounded: None) -> None:
    kept = without_launcher(keep_slurm=True)
    assert kept["SLURM_NTASKS"] == "8" and "RANK" not in kept and "PMI_RANK" not in kept


def test_a_run_of_four_ranks_starts_inside_a_launcher_of_one(
    surrounded: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = run_job(small_job(train__steps=2), "ddp", tmp_path, nproc=RANKS)
    assert record and (record.status, record.world_size) == ("ok", RANKS)
    assert "started this one process, which starts the 4 ranks" in capfd.readouterr().err
    assert "RANK" in os.environ  # this process's own stay


def test_only_a_launcher_of_one_process_leaves_the_ranks_to_it() -> None:
    alone, rank = Placement(0, 1, 0, "srun"), Placement(1, 4, 1, "srun")
    assert set_apart(alone, 4) == Placement()
    assert set_apart(alone, None) == set_apart(alone, 1) == alone
    assert set_apart(rank, 8) == rank and set_apart(Placement(), 4) == Placement()


def test_ranks_of_a_launcher_do_not_start_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(JobError, match="--nproc 2: the launcher started 4 processes"):
        run_job(small_job(), "ddp", tmp_path, nproc=2)
