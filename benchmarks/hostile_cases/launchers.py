"""Draws the variables of launchers: nonsense in them, and ones that a surrounding job left."""

from __future__ import annotations

import random
from typing import Any

from .case import (
    EITHER,
    RIGHT,
    WRONG,
    Case,
    Word,
    compare,
    draw_in_turn,
    laid,
    lay_job,
    shown,
    train,
)
from .grounds import lay_run

KIND = "launchers"
FAMILIES: dict[str, dict[str, str]] = {
    "torchrun": {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2",
                 "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                 "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": "29511"},
    "srun": {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
             "SLURM_JOB_ID": "7",
             "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0",
             "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"},
    "MPICH": {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
}  # fmt: skip
NO_NUMBER: list[Word] = ["abc", "-1", "", "9" * 30, "1.5", " ", "\u0663", "0x1", b"\xff", "nan",
                         "1e1", "--", "0;1",
                         "x" * 100000, "\x1b[31m0"]  # fmt: skip
MUST_BE_NUMBERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MASTER_PORT",
    ),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MASTER_PORT"),
}
SHORT = ("--set", "launch.start_timeout_s=3")


def _train() -> list[Word]:
    return ["train", "job.toml", "--strategy", "ddp", "--out", "out", *SHORT]


def _case(number: int, what: str, given: dict[str, Any], command: list[Word], **more: Any) -> Case:
    return Case(KIND, number, what, command, lay_job, given, **more)


def no_number(draw: random.Random, number: int) -> Case:
    """Give no number where a launcher gives one."""
    family = list(FAMILIES)[number % len(FAMILIES)] if draw.random() < 0.6 else "torchrun"
    key, value = draw.choice(MUST_BE_NUMBERS[family]), draw.choice(NO_NUMBER)
    variables = {**FAMILIES[family], key: value}
    return _case(number, f"{family}: {key} = {value[:20]!r}", variables, _train(), words=(key,))


def no_port(draw: random.Random, number: int) -> Case:
    """Give a port that there is not."""
    value = draw.choice(["99999", "-5", "65536", "0", "80 ", "http", "29500,29501", "29500.0"])
    variables = {**FAMILIES["torchrun"], "MASTER_PORT": value}
    return _case(
        number, f"MASTER_PORT = {value!r}", variables, _train(), words=("MASTER_PORT", shown(value))
    )


def no_address(draw: random.Random, number: int) -> Case:
    """Give an address of rank 0 that nobody has, to a rank that must reach it."""
    values: list[Word] = [
        "",
        "no.such.host.invalid",
        "256.1.1.1",
        b"\xff",
        "a b",
        "::::",
        "x" * 5000,
        "-",
        "\x1b[31m",
    ]
    value = draw.choice(values)
    variables = {**FAMILIES["torchrun"], "MASTER_ADDR": value, "RANK": draw.choice(["0", "1"])}
    return _case(number, f"MASTER_ADDR = {value[:20]!r}", variables, _train(), ends=frozenset({1,
        2}),
                 starts=True, words=("MASTER_ADDR",), own_code=True, limit_s=60)  # fmt: skip


def contradiction(draw: random.Random, number: int) -> Case:
    """Have the variables contradict each other, or have half of them."""
    family = draw.choice(list(FAMILIES))
    rank, world = MUST_BE_NUMBERS[family][:2]
    variables: dict[str, Any] = dict(FAMILIES[family])
    how = draw.choice(["rank is the world size", "no world", "no rank", "world 0", "rank beyond"])
    if how in ("no world", "no rank"):
        variables.pop(world if how == "no world" else rank)
        if how == "no world" and family != "torchrun":  # no launcher's job step, then
            how, variables = "rank is the world size", {**FAMILIES[family], rank: "2"}
    else:
        variables |= {
            "rank is the world size": {rank: "2"},
            "world 0": {world: "0"},
            "rank beyond": {rank: "999"},
        }[how]
    return _case(number, f"{family}: {how}", variables, _train(), words=(f"{rank}|{world}",))


def compare_inside(draw: random.Random, number: int) -> Case:
    """Start a comparison as a rank of a launcher: no two in one folder by accident."""
    family = draw.choice(list(FAMILIES))
    variables = dict(FAMILIES[family])
    words = compare()
    if draw.random() < 0.5:
        variables = {**variables, MUST_BE_NUMBERS[family][0]: "1"}
    return _case(
        number,
        f"compare as a rank of {family}",
        variables,
        words,
        words=(f"{family}|launcher|srun|torchrun|rank",),
    )


LEFT: dict[str, dict[str, str]] = {
    "a batch script of SLURM": {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "64",
                                "SLURM_LOCALID": "0",
                                "SLURM_JOB_NODELIST": "node[1-8]", "SLURM_NODEID": "0"},
    "a script's address": {"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"},
    "a script's port": {"MASTER_PORT": "1"},
    "LOCAL_RANK alone": {"LOCAL_RANK": "3"},
    "LOCAL_WORLD_SIZE alone": {"LOCAL_WORLD_SIZE": "64"},
    "GROUP_RANK and more of torchrun": {"GROUP_RANK": "1", "ROLE_RANK": "3",
                                        "GROUP_WORLD_SIZE": "2",
                                        "TORCHELASTIC_RUN_ID": "none",
                                        "TORCHELASTIC_MAX_RESTARTS": "0"},
    "restarts that are no number": {"TORCHELASTIC_RESTART_COUNT": "abc",
                                    "SLURM_RESTART_COUNT": "x"},
    "accelerate's": {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true",
                     "FSDP_VERSION": "1"},
    "deepspeed's": {"CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"},
    "PMI of a manager": {"PMI_FD": "7", "PMI_ID": "0", "PMIX_RANK": "0"},
    "OpenMP's": {"OMP_NUM_THREADS": "2", "OMP_PROC_BIND": "true"},
    "a store of its own": {"TORCHELASTIC_USE_AGENT_STORE": "True"},
    "an interface that is not there": {"GLOO_SOCKET_IFNAME": "nosuch0",
                                       "NCCL_SOCKET_IFNAME": "nosuch0"},
}  # fmt: skip


def left_behind(draw: random.Random, number: int) -> Case:
    """Have variables that a surrounding script or launcher left: our own ranks do not heed them."""
    key = list(LEFT)[number % len(LEFT)]
    many = draw.random() < 0.6
    words = train(*SHORT, strategy="ddp" if many else "single", nproc="2" if many else "1")
    ends = EITHER if key in ("accelerate's", "an interface that is not there") else RIGHT
    return _case(number, f"{words[3]} beside {key}", LEFT[key], words, ends=ends, starts=True)


def reading(draw: random.Random, number: int) -> Case:
    """Read a run, or check a job, where a launcher's variables are nonsense."""
    variables = {
        **FAMILIES["torchrun"],
        draw.choice(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"]): draw.choice(NO_NUMBER),
    }
    commands: list[list[Word]] = [
        ["inspect", "run"], ["strategies"], ["--version"], ["train", "nosuch.toml", "--strategy",
            "single"],
        ["eval", "run", "--out", "out"], ["check", "job.toml", "--strategies", "single", "--nproc",
                                          "1"],
        ["export", "run", "--to", "out"], ["doctor", "job.toml"], ["init", "out"],
    ]  # fmt: skip
    words = draw.choice(commands)
    return Case(KIND, number, f"{words[0]} beside nonsense", words, laid(lay_job, lay_run),
                variables,
                ends=EITHER | {1} if words[0] == "doctor" else EITHER, starts=words[0] in ("eval",
                    "check"),
                out=("out", "out.py", "out.toml"))  # fmt: skip


def world_of_one(draw: random.Random, number: int) -> Case:
    """Be the one rank of a launcher, which is right."""
    family = draw.choice(list(FAMILIES))
    variables = {k: "1" if v == "2" else v for k, v in FAMILIES[family].items()}
    variables.pop("MASTER_PORT", None)
    words: list[Word] = ["train", "job.toml", "--strategy", "single", "--out", "out", *SHORT]
    return _case(number, f"the one rank of {family}", variables, words, ends=RIGHT, starts=True)


def accelerate_nonsense(draw: random.Random, number: int) -> Case:
    """Give nonsense in the variables that accelerate's launcher sets."""
    keys = {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_USE_FSDP": "maybe",
            "FSDP_VERSION": "x",
            "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DYNAMO_BACKEND": "nosuch",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "abc",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "two",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nonexistent",
            "ACCELERATE_NUM_CPU_THREADS_PER_PROCESS": "x"}  # fmt: skip
    key = draw.choice(list(keys))
    variables = {**FAMILIES["torchrun"], "ACCELERATE_MIXED_PRECISION": "no", key: keys[key]}
    strategy = draw.choice(["ddp", "zero2", "fsdp"])
    words: list[Word] = ["train", "job.toml", "--strategy", strategy, "--out", "out", *SHORT]
    return _case(number, f"{strategy}: {key} = {keys[key]!r}", variables, words,
                 ends=WRONG | {1}, own_code=True, starts=True, limit_s=60)  # fmt: skip


TAKEN = [no_number, no_number, no_port, left_behind, contradiction, compare_inside, no_number,
         reading,
         left_behind, no_address, no_number, accelerate_nonsense, world_of_one]  # fmt: skip


def draw(source: random.Random, number: int) -> Case:
    """Return the case of a number."""
    return draw_in_turn(TAKEN, source, number, (left_behind,))
