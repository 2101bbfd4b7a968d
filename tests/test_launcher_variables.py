"""Nonsense in a launcher's variables: one line names the variable, before torch is imported."""

from __future__ import annotations

import os
from typing import Any

import pytest

import hybrid
from hybrid.job.errors import JobError
from hybrid.launch.environment import without_launcher
from hybrid.launch.variable_check import check_variables
from tests.conftest import JOBS, small_job
from tests.refusals import lines_before_torch

PAIR = {"RANK": "1", "WORLD_SIZE": "4"}
MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
STEP = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
NONSENSE: list[tuple[dict[str, str], str]] = [
    (PAIR | {"LOCAL_RANK": "abc"}, "LOCAL_RANK = 'abc': valid: a whole number from 0 to "),
    (PAIR | {"LOCAL_RANK": "4"}, "LOCAL_RANK = '4': valid with WORLD_SIZE = '4': "),
    (PAIR | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "valid with LOCAL_WORLD_SIZE = '2'"),
    (PAIR | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE = '5': valid: at most WORLD_SIZE = '4'"),
    (PAIR | {"NODE_RANK": "-1"}, "NODE_RANK = '-1'"),
    (PAIR | {"GROUP_RANK": "1.0"}, "GROUP_RANK = '1.0'"),
    (PAIR | {"TORCHELASTIC_RESTART_COUNT": "often"}, "TORCHELASTIC_RESTART_COUNT = 'often'"),
    (PAIR | MEETING | {"MASTER_PORT": "abc"}, "MASTER_PORT = 'abc': valid: a whole number from 1"),
    (PAIR | MEETING | {"MASTER_PORT": ""}, "MASTER_PORT = ''"),
    (PAIR | MEETING | {"MASTER_PORT": "0"}, "MASTER_PORT = '0'"),
    (PAIR | MEETING | {"MASTER_PORT": "65536"}, "from 1 to 65535"),
    (PAIR | MEETING | {"MASTER_ADDR": ""}, "MASTER_ADDR = '': valid: a host's name or address"),
    (PAIR | MEETING | {"MASTER_ADDR": "node1:29500"}, "without a port"),
    (PAIR | MEETING | {"MASTER_ADDR": "two words"}, "MASTER_ADDR = 'two words'"),
    (PAIR | {"MASTER_ADDR": "node1"}, "MASTER_ADDR = 'node1': MASTER_PORT is not set"),
    (PAIR | {"MASTER_PORT": "29500"}, "MASTER_PORT = '29500': MASTER_ADDR is not set"),
    ({"RANK": "0"}, "RANK = '0': WORLD_SIZE is not set; valid: both, or none"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE = '2': RANK is not set"),
    (PAIR | MEETING | {"MASTER_ADDR": "-"}, "MASTER_ADDR = '-'"),
    (PAIR | {"RANK": ""}, "RANK = ''"),
    (PAIR | {"RANK": " 1"}, "RANK = ' 1'"),
    (PAIR | {"RANK": "\u0661"}, "RANK = "),  # a digit, and none that int() and torch agree on
    (PAIR | {"WORLD_SIZE": "0"}, "WORLD_SIZE = '0': valid: a whole number from 1"),
    (PAIR | {"WORLD_SIZE": "9" * 5000}, f"WORLD_SIZE = '{'9' * 60}' ...: valid"),
    (PAIR | {"WORLD_SIZE": "1000000000"}, "WORLD_SIZE = '1000000000'"),
    (PAIR | {"RANK": "4"}, "RANK = '4': valid with WORLD_SIZE = '4': a whole number from 0 to 3"),
    (STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID = 'x'"),
    (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID = '4': valid with SLURM_STEP_NUM_TASKS = '4'"),
    (STEP | {"SLURM_LOCALID": ""}, "SLURM_LOCALID = ''"),
    (STEP | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS = 'many'"),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS = '4': SLURM_PROCID is not set"),
    ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK = '0': OMPI_COMM_WORLD_SIZE is not set"),
    ({"OMPI_COMM_WORLD_RANK": "4", "OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK = '4'"),
    ({"PMI_RANK": "1", "PMI_SIZE": "-4"}, "PMI_SIZE = '-4'"),
    ({"PMI_SIZE": "4"}, "PMI_SIZE = '4': PMI_RANK is not set"),
    ({"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS = 'all'"),
]
SENSE: list[dict[str, str]] = [
    {},
    PAIR,
    PAIR | MEETING | {"MASTER_ADDR": "fe80::1%eth0"},
    PAIR | MEETING | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | STEP,  # srun torchrun
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},  # a batch script
    {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    STEP | {"MASTER_ADDR": "n1"},  # the port follows from the job's number
    MEETING,  # exported for what starts later
    {"LOCAL_RANK": "3", "TORCHELASTIC_RESTART_COUNT": "x"},  # left by a script; no rank reads them
]
COMMANDS = [["train", "JOB", "--strategy", "ddp"], ["compare", "JOB"], ["check", "JOB"]]
COMMANDS += [["eval", "X"], ["export", "X", "--to", "Y"], ["generate", "X"], ["doctor"]]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets these variables of a launcher, and no others."""

    def put(variables: dict[str, str]) -> None:
        for key in os.environ.keys() - without_launcher().keys():
            monkeypatch.delenv(key)
        for key, value in variables.items():
            monkeypatch.setenv(key, value)

    return put


@pytest.mark.parametrize(("variables", "words"), NONSENSE, ids=lambda x: str(x)[:60])
def test_nonsense_is_refused_in_one_line(variables: dict[str, str], words: str, only: Any) -> None:
    only(variables)
    with pytest.raises(JobError) as refused:
        check_variables()
    assert words in str(refused.value) and "valid" in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize("variables", SENSE, ids=str)
def test_what_launchers_and_shells_set_is_taken(variables: dict[str, str], only: Any) -> None:
    only(variables)
    check_variables()


def test_every_command_that_reads_them_refuses_before_torch_is_imported() -> None:
    job = str(JOBS / "linear.toml")
    commands = [[word.replace("JOB", job) for word in words] for words in COMMANDS]
    lines = lines_before_torch(commands, without_launcher() | PAIR | {"MASTER_PORT": "65536"})
    line = "hybrid: MASTER_PORT = '65536': valid: a whole number from 1 to 65535"
    assert lines == [line] * len(COMMANDS)


def test_the_python_api_refuses_too(only: Any) -> None:
    only({"PMI_RANK": "0", "PMI_SIZE": "none"})
    for call in (hybrid.train, hybrid.compare):
        with pytest.raises(JobError, match="PMI_SIZE = 'none'"):
            call(small_job(), "single")
