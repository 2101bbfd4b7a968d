"""Which launcher started a process, as which rank, and what its configuration may not say."""

from __future__ import annotations

import os
from typing import Any

import pytest

from hybrid.job.errors import JobError
from hybrid.launch.accelerate_env import check_configuration, check_started
from hybrid.launch.environment import launcher_name, num_local_ranks, without_launcher
from hybrid.launch.placement import PORTS, Placement, export_rank_variables, find_placement
from tests.conftest import small_job

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
STEP = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "12"}
STEP |= {"SLURM_NODEID": "0"}
SRUN = STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_NODES": "1"}
SRUN |= {"SLURM_STEP_TASKS_PER_NODE": "4"}
# What the shell of `salloc -n4` has under LaunchParameters=use_interactive_step, seen with 22.05.
SALLOC = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
SALLOC |= {"SLURM_PTY_PORT": "43497", "SLURM_STEP_TASKS_PER_NODE": "1"}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the variables of a launcher, and those alone."""
    words = ("RANK", "WORLD_SIZE", "OMPI_", "PMI_", "MPI_", "SLURM_", "MASTER_", "ACCELERATE_")
    for key in list(os.environ):
        if key.startswith((*words, "LOCAL_")) or key == "CROSS_RANK":
            monkeypatch.delenv(key)
    adopted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

    def put(variables: dict[str, str]) -> None:
        for key in adopted:
            monkeypatch.setenv(key, "")  # so that what `adopt` sets goes again
            monkeypatch.delenv(key)
        for key in os.environ.keys() - without_launcher().keys():
            monkeypatch.delenv(key)
        for key, value in variables.items():
            monkeypatch.setenv(key, value)

    return put


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, Placement(0, 1, 0, None)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Placement(3, 4, 3, "torchrun", local_known=False)),
        (TORCH, Placement(5, 8, 1, "torchrun")),
        (TORCH | {"CROSS_RANK": "0"}, Placement(5, 8, 1, "deepspeed")),
        (TORCH | {"ACCELERATE_MIXED_PRECISION": "no"}, Placement(5, 8, 1, "accelerate launch")),
        (OPEN_MPI, Placement(3, 4, 1, "Open MPI")),
        (MPICH, Placement(1, 2, 1, "MPICH")),
        (SRUN, Placement(2, 4, 0, "srun")),
        (SRUN | TORCH, Placement(5, 8, 1, "torchrun")),  # srun torchrun
        (SALLOC, Placement()),  # a shell in an allocation
        (SRUN | {"SLURM_PTY_PORT": "1"}, Placement(2, 4, 0, "srun")),  # srun in that shell
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4"}, Placement(2, 4, 0, "srun")),  # --mpi=pmi2
        (SALLOC | MPICH, Placement(1, 2, 1, "MPICH")),  # mpirun in that shell
        (SRUN | MPICH, Placement(1, 2, 1, "MPICH")),  # mpirun that reaches its hosts by srun
        (STEP, Placement(0, 1, 0, None)),  # a batch script, no step of srun's
    ],
)
def test_ranks_come_from_the_launcher(
    variables: dict[str, str], found: Placement, environ: Any
) -> None:
    environ(variables)
    assert find_placement() == found and launcher_name() == found.launcher


def test_a_rank_that_hybrid_started_is_told_so_by_an_argument(environ: Any) -> None:
    environ(TORCH)
    assert find_placement(started_by_hybrid=True) == Placement(5, 8, 1, "hybrid")
    assert not find_placement(True).under_foreign_launcher


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_ranks_that_make_no_sense_are_refused(variables: dict[str, str], environ: Any) -> None:
    """tests/test_launcher_variables.py has the other ones."""
    environ(variables)
    with pytest.raises(JobError, match=r"RANK = .*; valid|RANK = .*: valid with WORLD_SIZE"):
        find_placement()


def test_what_other_launchers_say_is_said_in_torch_s_variables(environ: Any) -> None:
    for variables, here in ((MPICH, "2"), (SRUN, "4")):
        environ(variables)
        ranks = find_placement()
        export_rank_variables(ranks)
        assert os.environ["LOCAL_WORLD_SIZE"] == here
        assert os.environ["RANK"] == str(ranks.rank)
        assert os.environ["WORLD_SIZE"] == str(ranks.world_size)
        assert os.environ["LOCAL_RANK"] == str(ranks.local_rank)
        assert os.environ["MASTER_ADDR"] == "localhost"
        assert int(os.environ["MASTER_PORT"]) in PORTS


def test_what_a_launcher_says_of_the_meeting_point_stands(environ: Any) -> None:
    environ(SRUN | {"MASTER_ADDR": "n7", "MASTER_PORT": "4711"})
    export_rank_variables(find_placement())
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n7", "4711")


def test_steps_of_slurm_meet_at_ports_of_their_own(environ: Any) -> None:
    ports = set()
    for job, step in ((12, 0), (12, 1), (13, 0)):
        environ(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        export_rank_variables(find_placement())
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 3


def test_mpi_on_several_hosts_needs_to_be_told_where(environ: Any) -> None:
    environ(OPEN_MPI)
    with pytest.raises(JobError, match=r"MASTER_ADDR and MASTER_PORT are not set.*-x MASTER_ADDR"):
        export_rank_variables(find_placement())


@pytest.mark.parametrize(
    ("variables", "here"),
    [
        ({}, 1),
        ({"RANK": "3", "WORLD_SIZE": "4"}, None),  # set by hand
        (TORCH | {"LOCAL_WORLD_SIZE": "4"}, 4),
        (TORCH | {"CROSS_RANK": "0", "LOCAL_SIZE": "2"}, 2),
        (OPEN_MPI, 2),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, 2),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NODEID": "1"}, 3),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"}, 1),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, None),
        (SRUN | TORCH | {"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 8),
    ],
)
def test_ranks_of_a_host_are_counted(
    variables: dict[str, str], here: int | None, environ: Any
) -> None:
    environ(variables)
    assert num_local_ranks() == here


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("strategy", "variables", "field"),
    [
        ("zero2", FSDP, "fsdp = 'true'"),
        ("ddp", FSDP, "fsdp = 'true'"),
        ("fsdp", FSDP | {"FSDP_VERSION": "1"}, "fsdp_version = '1'"),
        ("fsdp", FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward"),
        ("fsdp", FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params = 'true'"),
        ("fsdp", FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation_checkpointing"),
        ("fsdp", FSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, "dp_replicate_size = '2'"),
        ("fsdp", FSDP | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size = '2'"),
        ("zero3", ZERO, "zero_stage = '2'; valid with this job: 3"),
        ("ddp", ZERO, "deepspeed = 'true'; valid with this job: false"),
        ("zero2", ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping = '1.0'"),
        ("zero2", ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "accumulation_steps"),
        ("zero2", ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param"),
        ("zero2", ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"}, "strategy.zero1.ds_conf"),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision = 'bf16'"),
        ("ddp", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend = 'INDUCTOR'"),
        ("ddp", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "megatron_lm = 'true'"),
    ],
)
def test_an_accelerate_configuration_that_says_otherwise_is_refused(
    strategy: str, variables: dict[str, str], field: str
) -> None:
    with pytest.raises(JobError, match=field) as refused:
        check_configuration(small_job(), strategy, variables)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("strategy", "variables"),
    [
        ("fsdp", FSDP),
        ("zero2", ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}),
        ("pipeline", {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}),
    ],
)
def test_one_that_says_the_same_is_taken(strategy: str, variables: dict[str, str]) -> None:
    check_configuration(small_job(), strategy, variables)


def test_one_process_for_a_run_of_two_is_refused() -> None:
    started = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
    check_started(1, started)
    check_started(2, {})
    check_started(2, started | {"RANK": "0"})
    with pytest.raises(JobError, match=r"2 processes, and accelerate launch started one.*MULTI"):
        check_started(2, started)
