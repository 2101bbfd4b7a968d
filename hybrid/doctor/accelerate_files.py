"""Judges a configuration of `accelerate launch`: what it starts, and what it only seems to say.

accelerate refuses unknown fields of the file, but takes every key of a section for an option: one
that it does not know is set and never read, and a value of a wrong type fails in a rank, or not at
all. Nor does it mind a key that stands twice, or a section that its `distributed_type` does not
read. A job that is configured by half looks like one that is configured, so this is stricter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import JobError
from ..known_keys import problem
from ..user_files import read_json, show
from .accelerate_keys import OLD, PREFIXES, UNREAD, table
from .plain_yaml import read_yaml

Config = dict[str, Any]
Trap = tuple[str, str]  # what a value does, and what to do about it
# Who reads a section that others leave alone. dynamo_config and fp8_config are read by all.
_READERS = {
    "fsdp_config": ("FSDP",),
    "deepspeed_config": ("DEEPSPEED",),
    "megatron_lm_config": ("MEGATRON_LM",),
    "mpirun_config": ("NO", "MULTI_CPU"),
}
_ALONE = ("NO", "MULTI_CPU")  # one process, unless mpirun starts more
_AXES = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
_DS_FILE = "deepspeed_config_file"
_QUOTE = "; YAML reads a bare no, NO or off as False: put it in quotes"


def judge(file: Path, where: str) -> tuple[str, list[Trap]]:
    """What a file would start, in words, and its traps. JobError, beginning with `where`, where it
    is malformed or cannot mean what it says."""
    is_json = file.suffix.lower() == ".json"
    return judge_config(read_json(file, where) if is_json else read_yaml(file, where), where)


def judge_config(config: Any, where: str) -> tuple[str, list[Trap]]:
    """The same of what a file holds."""
    if not isinstance(config, dict):
        held = "nothing" if config is None else f"a {type(config).__name__}"
        raise JobError(f"{where}: holds {held}, not a mapping of accelerate's keys")
    config = _in_full(config, where)
    known = table()
    if wrong := problem(config, known):
        quote = _QUOTE if " = False: " in wrong else ""
        raise JobError(f"{where}: {wrong} (by accelerate {known['accelerate']}){quote}")
    if "distributed_type" not in config:
        names = known["properties"]["distributed_type"]["enum"]
        raise JobError(f"{where}: distributed_type: missing; valid: {', '.join(names)}")
    for wrong in _contradictions(config):
        raise JobError(f"{where}: {wrong}")
    return _describe(config), list(_traps(config))


def _in_full(config: Config, where: str) -> Config:
    """The configuration with its sections' keys as accelerate completes them: `version` in
    fsdp_config is fsdp_version."""
    full = dict(config)
    for section in ("fsdp_config", "fp8_config", "dynamo_config"):
        prefix, found = PREFIXES[section], {}
        if not isinstance(config.get(section), dict):
            continue
        for key, value in config[section].items():
            name = key if key.startswith(prefix.rstrip("_")) else prefix + key
            if name in found:
                raise JobError(f"{where}: {section}.{show(name)} stands twice, once as {show(key)}")
            found[name] = value
        full[section] = found
    return full


def _section(config: Config, name: str) -> Config:
    return config.get(name) or {}


def _contradictions(config: Config) -> Iterator[str]:
    """What accelerate would end on later, or round off."""
    kind, processes = config["distributed_type"], _processes(config)
    machines, rank = config.get("num_machines", 1), config.get("machine_rank", 0)
    for old, new in OLD.items():
        if old in config and new in config:
            yield f"{old} = {show(config[old])}: {new} says it too; valid: one of the two"
    if rank >= machines:
        yield f"machine_rank = {rank}: valid: less than num_machines = {machines}"
    counted = not _started_alone(config) and not _by_filter(config)
    if processes and processes % machines and counted:
        yield (
            f"num_processes = {processes}: counts all machines together; valid: a multiple of "
            f"num_machines = {machines}"
        )
    ids, several = config.get("gpu_ids") or "all", kind.startswith("MULTI_") and kind not in _ALONE
    if several and machines == 1 and ids != "all" and "," not in ids:
        yield f"gpu_ids = {show(ids)}: accelerate wants two for {kind}; valid: 'all', '0,1', ..."
    sizes = [_section(config, "parallelism_config").get(_size(axis), 1) for axis in _AXES]
    total = math.prod(sizes)
    if processes and total not in (1, processes) and sizes[-1] == 1:
        yield f"parallelism_config: the sizes' product is {total}; valid: num_processes {processes}"
    if kind == "FSDP":
        yield from _contradictions_of_fsdp(config)


def _contradictions_of_fsdp(config: Config) -> Iterator[str]:
    section = _section(config, "fsdp_config")
    reshard = section.get("fsdp_reshard_after_forward", True)  # FSDP 1 never looks at it
    if _fsdp_version(config) == 2 and str(reshard).lower() not in ("true", "false"):
        yield f"fsdp_config.fsdp_reshard_after_forward = {show(reshard)}: valid: true or false"
    loading = section.get("fsdp_cpu_ram_efficient_loading", True)  # to accelerate, any text is true
    if loading and not section.get("fsdp_sync_module_states", True):
        yield (
            "fsdp_config.fsdp_sync_module_states = False: valid: true, or "
            "fsdp_cpu_ram_efficient_loading: false (left out or in quotes, it is true)"
        )


def _size(axis: str) -> str:
    return f"parallelism_config_{axis}_size"


def _fsdp_version(config: Config) -> int:
    """accelerate's own is 1 where the file says none."""
    return int(_section(config, "fsdp_config").get("fsdp_version", 1))


def _processes(config: Config) -> int | None:
    """None where --num_processes has to say it: what is left out is -1 to accelerate, 1 with NO."""
    own = 1 if config["distributed_type"] == "NO" else -1
    number = config.get("num_processes", own)
    return None if number == -1 else number


def _launcher(config: Config) -> str:
    """What reaches the other machines with DEEPSPEED."""
    return _section(config, "deepspeed_config").get("deepspeed_multinode_launcher") or "pdsh"


def _by_filter(config: Config) -> bool:
    """Whether a filter of the hostfile says how many are started, in place of num_processes."""
    if config["distributed_type"] != "DEEPSPEED" or config.get("num_machines", 1) == 1:
        return False
    section = _section(config, "deepspeed_config")
    named = any(section.get(f"deepspeed_{kind}clusion_filter") for kind in ("in", "ex"))
    return named and _launcher(config) != "standard"


def _started_alone(config: Config) -> bool:
    by_mpirun = _section(config, "mpirun_config").get("mpirun_hostfile")
    return config["distributed_type"] in _ALONE and not by_mpirun


def _describe(config: Config) -> str:
    kind, machines = config["distributed_type"], config.get("num_machines", 1)
    number = machines if _started_alone(config) else _processes(config)
    processes = count(number, "process") if number else "processes as --num_processes says"
    if _by_filter(config):
        processes = "processes as the filter says"
    words = [kind, f"{processes} on {count(machines, 'machine')}"]
    if kind == "FSDP":
        words.append(f"FSDP {_fsdp_version(config)}")
    if kind == "DEEPSPEED" and not _section(config, "deepspeed_config").get(_DS_FILE):
        words.append(f"ZeRO {_stage(config)}")
    if (precision := str(config.get("mixed_precision") or "no").lower()) != "no":
        words.append(precision)
    return f"accelerate configuration: {', '.join(words)}{_strategies(config)}"


def count(number: int, word: str) -> str:
    """`2 machines`."""
    return f"{number} {word}{'' if number == 1 else 'es' if word.endswith('s') else 's'}"


def _stage(config: Config) -> int:
    """accelerate's own is 2 where the file says none."""
    stage = _section(config, "deepspeed_config").get("zero_stage")
    return 2 if stage is None else int(stage)


def _strategies(config: Config) -> str:
    kind = config["distributed_type"]
    if any(_refused(config)):
        return ""
    if kind == "FSDP":
        return "; for fsdp"
    if kind == "DEEPSPEED":
        return f"; for zero{_stage(config)}"
    every = kind.startswith("MULTI_") and not _started_alone(config)
    return "; for every strategy" if every else ""


def _traps(config: Config) -> Iterator[Trap]:
    kind, processes = config["distributed_type"], _processes(config)
    if processes is None:
        yield "num_processes is left out", "give accelerate launch --num_processes"
    several = config.get("num_machines", 1) > 1
    if _started_alone(config) and ((processes or 1) > 1 or several):
        end = "each a run of its own" if several else f"not {processes}"
        mend = "distributed_type: MULTI_GPU starts num_processes, on CPUs too; or name an "
        mend += "mpirun_hostfile"
        yield f"{kind} starts one process on a machine without mpirun, {end}", mend
    yield from _traps_of_machines(config)
    for section, readers in _READERS.items():
        if config.get(section) and kind not in readers:
            mend = f"leave it out, or set distributed_type to {' or '.join(readers)}"
            yield f"{section} is not read with {kind}", mend
    for key, read in UNREAD.items():
        if key in _section(config, "fp8_config"):
            yield f"fp8_config.{key} is read by nothing, though accelerate config writes it", read
    for found, valid in _refused(config):
        yield f"no job takes {found}", valid


def _traps_of_machines(config: Config) -> Iterator[Trap]:
    if config.get("num_machines", 1) == 1:
        return
    if not config.get("main_process_ip"):
        yield "main_process_ip is left out", "give accelerate launch --main_process_ip"
    if config["distributed_type"] in _ALONE and config.get("main_process_port") is None:
        yield "main_process_port is left out", "give accelerate launch --main_process_port"
    launcher = _launcher(config)
    if config["distributed_type"] == "DEEPSPEED" and launcher not in ("standard", "nossh"):
        by = "by srun" if launcher == "slurm" else f"over ssh, by {launcher}"
        mend = "deepspeed_multinode_launcher: standard, and the command on each machine"
        yield f"the other machines are reached {by}", mend


def _refused(config: Config) -> Iterator[Trap]:
    """What ranks refuse whatever the job (hybrid/accelerate_launch.py), and what is valid there."""
    kind, deepspeed = config["distributed_type"], _section(config, "deepspeed_config")
    if kind in ("XLA", "MEGATRON_LM"):
        yield f"distributed_type {kind}", "valid: MULTI_GPU and the like, FSDP, DEEPSPEED"
    if kind == "FSDP" and _fsdp_version(config) != 2:
        yield "FSDP 1, which accelerate takes where none is named", "fsdp_version: 2"
    if str(_section(config, "fsdp_config").get("fsdp_offload_params", False)).lower() == "true":
        yield "fsdp_offload_params", "valid: false"
    if kind == "DEEPSPEED" and not _stage(config):
        yield "zero_stage 0", "valid: 1, 2 or 3; pipeline and 2d take a MULTI_GPU configuration"
    if deepspeed.get(_DS_FILE):
        yield _DS_FILE, "give the file to the job instead, as strategy.zero1.ds_config and so on"
    for key in ("offload_optimizer_device", "offload_param_device"):
        if (deepspeed.get(key) or "none").lower() != "none":
            yield f"{key} {deepspeed[key]}", "valid: none"
    for axis in _AXES[2:]:
        if _section(config, "parallelism_config").get(_size(axis), 1) > 1:
            yield _size(axis), "valid: 1"
    dynamo = _section(config, "dynamo_config").get("dynamo_backend") or config.get("dynamo_backend")
    if (dynamo or "no").lower() not in ("no", "inductor"):
        yield f"dynamo_backend {dynamo}", "valid: NO, INDUCTOR"
    if str(config.get("mixed_precision")).lower() == "fp8":
        yield "mixed_precision fp8", "valid: no, bf16, fp16"
