"""Checks a configuration of `accelerate launch`: what it starts, and what contradicts a job.

accelerate refuses unknown fields. It takes any key inside a section, and finds most wrong values
late or never, so a file that means something else than it says looks like one that is right."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..job.errors import JobError
from ..job.known_keys import problem
from ..job.reading import show
from ..launch.ops_cache import package_version
from .finding import count

Config = dict[str, Any]
Trap = tuple[str, str]  # what a value does, and what to do about it
# A table of `job.known_keys`, whose rows also say: `read_with`, the values of distributed_type that
# make accelerate read a key; `now`, the key that replaces an old one; `meant`, the key to write in
# place of one that nothing reads; `job`, the values that jobs take; `instead`, those in words.
KEYS_FILE = Path(__file__).parent / "accelerate_keys.json"
_ALONE = ("NO", "MULTI_CPU")  # these start one process on a machine, unless mpirun starts more
_AXES = [f"parallelism_config_{a}_size" for a in ("dp_replicate", "dp_shard", "tp", "cp", "sp")]


def check_config(config: Any, where: str) -> tuple[str, list[Trap]]:
    """Return what a configuration would start, in words, and its traps.

    Raises JobError, beginning with `where`, if it is malformed or cannot mean what it says."""
    if not isinstance(config, dict):
        held = "nothing" if config is None else f"a {type(config).__name__}"
        raise JobError(f"{where}: holds {held}, not a mapping of accelerate's keys")
    config, known = _complete(config, where), known_keys()
    if wrong := problem(config, known):
        quote = "; YAML reads a bare no, NO or off as False: put it in quotes"
        end = quote if " = False: " in wrong else ""
        raise JobError(f"{where}: {wrong} (by accelerate {known['accelerate']}){end}")
    if "distributed_type" not in config:
        kinds = ", ".join(known["properties"]["distributed_type"]["enum"])
        raise JobError(f"{where}: distributed_type: missing; valid: {kinds}")
    start = _Start(config, known["properties"])
    for wrong in _contradictions(start):
        raise JobError(f"{where}: {wrong}")
    return _describe(start), list(_traps(start))


def known_keys() -> dict[str, Any]:
    """Read the table of keys; with another release of accelerate it takes keys that it lacks."""
    table = json.loads(KEYS_FILE.read_text())
    ours, installed = f"{table['accelerate']}.", package_version("accelerate")
    for row in (table, *table["properties"].values()):
        row["others"] = installed is not None and not installed.startswith(ours)
    return table


def _complete(config: Config, where: str) -> Config:
    """Complete the keys of sections as accelerate does: `version` stands for fsdp_version."""
    full = dict(config)
    for prefix in ("fsdp", "fp8", "dynamo"):
        section, found = f"{prefix}_config", Config()
        if not isinstance(config.get(section), dict):
            continue
        for key, value in config[section].items():
            name = key if key.startswith(prefix) else f"{prefix}_{key}"
            if name in found:
                raise JobError(f"{where}: {section}.{show(name)} stands twice, once as {show(key)}")
            found[name] = value
        full[section] = found
    return full


class _Start:
    """Holds what a configuration starts, with accelerate's own values where it says nothing."""

    def __init__(self, config: Config, fields: Config) -> None:
        self.config, self.fields = config, fields
        self.kind = kind = config["distributed_type"]
        # accelerate too makes one set of options of the fields and all sections that it reads.
        self.options, self.rows = dict(config), dict(fields)
        for name, row in fields.items():
            inner, section = row.get("properties", {}), config.get(name) or {}
            self.rows |= inner
            if kind in row.get("read_with", [kind]):
                self.options |= {key: section[key] for key in inner if key in section}
        self.get = get = self.options.get
        self.machines, self.several = get("num_machines", 1), get("num_machines", 1) > 1
        processes = get("num_processes", 1 if kind == "NO" else -1)
        self.processes = None if processes == -1 else processes  # None: an option has to say it
        self.alone = kind in _ALONE and not get("mpirun_hostfile")
        self.fsdp = int(get("fsdp_version", 1)) if kind == "FSDP" else None
        stage = get("zero_stage")
        self.zero = (2 if stage is None else int(stage)) if kind == "DEEPSPEED" else None
        self.launcher = get("deepspeed_multinode_launcher") or "pdsh"
        # deepspeed starts what a filter of its hostfile leaves, in place of num_processes.
        filters = get("deepspeed_inclusion_filter"), get("deepspeed_exclusion_filter")
        by_deepspeed = kind == "DEEPSPEED" and self.several and self.launcher != "standard"
        self.filtered = by_deepspeed and any(filters)


def _contradictions(start: _Start) -> Iterator[str]:
    """Yield what accelerate would fail on later, or round off."""
    kind, processes, machines = start.kind, start.processes, start.machines
    for old, row in start.fields.items():
        if old in start.config and (new := row.get("now")) in start.config:
            yield f"{old} = {show(start.config[old])}: {new} says it too; valid: one of the two"
    if (rank := start.get("machine_rank", 0)) >= machines:
        yield f"machine_rank = {rank}: valid: less than num_machines = {machines}"
    if processes and processes % machines and not start.alone and not start.filtered:
        valid = f"a multiple of num_machines = {machines}"
        yield f"num_processes = {processes}: counts all machines together; valid: {valid}"
    ids = start.get("gpu_ids") or "all"
    one_gpu = kind.startswith("MULTI_") and ids != "all" and "," not in ids
    if one_gpu and kind != "MULTI_CPU" and not start.several:
        yield f"gpu_ids = {show(ids)}: accelerate wants two for {kind}; valid: 'all', '0,1', ..."
    sizes = [start.get(axis, 1) for axis in _AXES]
    total = math.prod(sizes)
    if processes and total not in (1, processes) and sizes[-1] == 1:
        yield f"parallelism_config: the sizes' product is {total}; valid: num_processes {processes}"
    reshard = start.get("fsdp_reshard_after_forward", True)
    if start.fsdp == 2 and str(reshard).lower() not in ("true", "false"):
        yield f"fsdp_config.fsdp_reshard_after_forward = {show(reshard)}: valid: true or false"
    loading = start.get("fsdp_cpu_ram_efficient_loading", True)  # any text is true to accelerate
    if start.fsdp and loading and not start.get("fsdp_sync_module_states", True):
        valid = "fsdp_cpu_ram_efficient_loading: false (left out or in quotes, it is true)"
        yield f"fsdp_config.fsdp_sync_module_states = False: valid: true, or {valid}"


def _describe(start: _Start) -> str:
    """Say what is started, and which strategies can use it."""
    number = start.machines if start.alone else start.processes
    processes = count(number, "process") if number else "processes as --num_processes says"
    if start.filtered:
        processes = "processes as the filter says"
    words = [start.kind, f"{processes} on {count(start.machines, 'machine')}"]
    takers = "every strategy" if start.kind.startswith("MULTI_") and not start.alone else ""
    if start.fsdp:
        words, takers = [*words, f"FSDP {start.fsdp}"], "fsdp"
    if start.zero is not None and not start.get("deepspeed_config_file"):
        words, takers = [*words, f"ZeRO {start.zero}"], f"zero{start.zero}"
    if (precision := str(start.get("mixed_precision") or "no").lower()) != "no":
        words.append(precision)
    promise = f"; for {takers}" if takers and not any(_refused(start)) else ""
    return f"accelerate configuration: {', '.join(words)}{promise}"


def _traps(start: _Start) -> Iterator[Trap]:
    """Yield each value that does something else than it seems to, and what to do about it."""
    kind, get, several = start.kind, start.get, start.several
    left_out = {
        "num_processes": start.processes is None,
        "main_process_ip": several and not get("main_process_ip"),
        "main_process_port": several and kind in _ALONE and get("main_process_port") is None,
    }
    for key in filter(left_out.get, left_out):
        yield f"{key} is left out", f"give accelerate launch --{key}"
    if start.alone and ((start.processes or 1) > 1 or several):
        end = "each a run of its own" if several else f"not {start.processes}"
        mend = "distributed_type: MULTI_GPU starts num_processes, on CPUs too; or name an "
        mend += "mpirun_hostfile"
        yield f"{kind} starts one process on a machine without mpirun, {end}", mend
    if start.zero is not None and several and start.launcher not in ("standard", "nossh"):
        by = "by srun" if start.launcher == "slurm" else f"over ssh, by {start.launcher}"
        mend = "deepspeed_multinode_launcher: standard, and the command on each machine"
        yield f"the other machines are reached {by}", mend
    for key, value in start.options.items():
        row = start.rows.get(key, {})
        if value and kind not in row.get("read_with", [kind]):
            mend = f"leave it out, or set distributed_type to {' or '.join(row['read_with'])}"
            yield f"{key} is not read with {kind}", mend
        if "meant" in row:
            yield f"{key} is read by nothing, though accelerate config writes it", row["meant"]
    for found, valid in _refused(start):
        yield f"no job takes {found}", valid


def _refused(start: _Start) -> Iterator[Trap]:
    """Yield what ranks refuse whatever the job is (`launch.accelerate_env`), and what is valid."""
    if start.fsdp == 1:
        yield "FSDP 1, which accelerate takes where none is named", "fsdp_version: 2"
    for key, value in start.options.items():
        row = start.rows.get(key, {})
        taken = row.get("job", [str(value)])
        if value not in (None, "") and str(value).lower() not in map(str.lower, taken):
            yield f"{key} {value}", f"valid: {row.get('instead', ', '.join(taken))}"
