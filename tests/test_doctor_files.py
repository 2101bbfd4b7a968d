"""Tests `hybrid doctor FILE...` on good files and their traps, and its table of accelerate's keys.

`test_malformed.py` has files that are malformed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid.doctor import accelerate_files
from hybrid.doctor.accelerate_files import check_config, known_keys
from hybrid.doctor.files import check_files, read_yaml
from hybrid.job.errors import JobError
from tests.conftest import ROOT, hybrid_command

SHIPPED = sorted(
    [
        *(ROOT / "launch" / "accelerate").iterdir(),
        ROOT / "launch" / "hostfile",
        *(ROOT / "ds_configs").glob("*.json"),
    ]
)
FSDP = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_version": 2}}
ZERO = {"distributed_type": "DEEPSPEED", "num_processes": 4}
CPU = {"distributed_type": "MULTI_CPU", "num_processes": 2}
# What the options of a section begin with. deepspeed_config's have several beginnings.
PREFIXES = {
    "fsdp_config": "fsdp_",
    "fp8_config": "fp8_",
    "dynamo_config": "dynamo_",
    "parallelism_config": "parallelism_config_",
    "megatron_lm_config": "megatron_lm_",
    "mpirun_config": "mpirun_",
}


def fsdp(**settings: Any) -> dict[str, Any]:
    return {"fsdp_config": {"fsdp_version": 2} | settings}


def zero(**settings: Any) -> dict[str, Any]:
    return {"deepspeed_config": settings}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_what_is_shipped_is_well(file: Path) -> None:
    (found,) = check_files([file])
    assert (found.name, found.status, found.mend) == (str(file), "ok", None)


def test_the_command_says_what_each_would_start() -> None:
    names = ["launch/accelerate/hybrid_fsdp.yaml", "launch/hostfile", "ds_configs/2d.json"]
    done = hybrid_command("doctor", *names, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["ok", name] for name in names]
    assert [line[2] for line in lines] == [
        "accelerate configuration: FSDP, 4 processes on 1 machine, FSDP 2; for fsdp",
        "hostfile: 2 hosts, 4 processes: node1 2, node2 2",
        "DeepSpeed configuration: ZeRO 1; for zero1 and 2d with strategy.2d.zero_stage = 1",
    ]


def test_as_json(tmp_path: Path) -> None:
    file = tmp_path / "cpu.yaml"
    file.write_text(yaml.safe_dump(CPU))
    done = hybrid_command("doctor", "--json", str(file), timeout=60)
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert report["ok"] is True and report["links"] == []
    fine, trap = report["findings"]
    assert (fine["name"], fine["status"]) == (str(file), "ok")
    assert (trap["name"], trap["status"]) == (str(file), "warning")
    assert "one process" in trap["found"] and "MULTI_GPU" in trap["mend"]


def test_good_files_are_said_before_one_that_is_malformed(tmp_path: Path) -> None:
    good, bad = tmp_path / "hosts", tmp_path / "bad"
    good.write_text("node1 slots=1 # the only one\r\n")
    bad.write_text("node1\n")
    done = hybrid_command("doctor", str(good), str(bad), timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f"hybrid: {bad}: line 1 = 'node1'")
    assert done.stdout == f"ok       {good!s:20} hostfile: 1 host, 1 process: node1 1\n"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FSDP, "FSDP, 4 processes on 1 machine, FSDP 2; for fsdp"),
        (FSDP | {"fsdp_config": {"version": "2"}}, "FSDP 2; for fsdp"),
        (FSDP | {"mixed_precision": "BF16"}, "FSDP 2, bf16; for fsdp"),
        (ZERO, "DEEPSPEED, 4 processes on 1 machine, ZeRO 2; for zero2"),
        (ZERO | {"deepspeed_config": {"zero_stage": 3}}, "ZeRO 3; for zero3"),
        (CPU | {"distributed_type": "MULTI_GPU", "fsdp_config": {}}, "for every strategy"),
        (CPU | {"mpirun_config": {"mpirun_hostfile": "h"}}, "2 processes on 1 machine; for every"),
        ({"distributed_type": "NO"}, "NO, 1 process on 1 machine"),
        (FSDP | {"dynamo_backend": "inductor", "gpu_ids": None}, "for fsdp"),
        (FSDP | {"downcast_bf16": "no", "tpu_env": [], "main_process_port": 0}, "for fsdp"),
        (FSDP | {"tpu_use_sudo": "yes"}, "for fsdp"),
        (FSDP | {"fp8_config": {"use_mxfp8_block_scaling": True}}, "for fsdp"),
        (FSDP | fsdp(fsdp_sharding_strategy=1, fsdp_backward_prefetch="2"), "for fsdp"),
        (FSDP | fsdp(fsdp_state_dict_type="3", fsdp_auto_wrap_policy="no_wrap"), "for fsdp"),
        (FSDP | fsdp(cpu_ram_efficient_loading=False, sync_module_states=False), "for fsdp"),
        (ZERO | zero(gradient_accumulation_steps="4", gradient_clipping="1.0"), "for zero2"),
        (ZERO | zero(gradient_clipping="1e-3", zero_stage="3"), "ZeRO 3; for zero3"),
    ],
)
def test_what_it_would_start(config: dict[str, Any], words: str) -> None:
    found, traps = check_config(config, "file")
    assert words in found and traps == []


MACHINES = {"num_machines": 2, "main_process_ip": "node1"}
OVER_MPI = {"mpirun_config": {"mpirun_hostfile": "h"}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CPU, "MULTI_CPU starts one process on a machine without mpirun, not 2"),
        (CPU | {"distributed_type": "NO"}, "NO starts one process"),
        ({"distributed_type": "MULTI_GPU"}, "num_processes is left out"),
        (FSDP | {"fsdp_config": {"fsdp_offload_params": "true"} | FSDP["fsdp_config"]}, "offload"),
        ({"distributed_type": "FSDP", "num_processes": 2}, "FSDP 1, which accelerate takes"),
        (FSDP | {"num_machines": 2}, "main_process_ip is left out"),
        (CPU | MACHINES | OVER_MPI, "main_process_port is left out"),
        (FSDP | {"num_processes": -1}, "num_processes is left out"),
        ({"distributed_type": "NO", "num_processes": -1}, "num_processes is left out"),
        (FSDP | fsdp(fsdp_version=1, reshard_after_forward=True), "FSDP 1"),
        (FSDP | {"dynamo_config": {"backend": "EAGER"}}, "no job takes dynamo_backend EAGER"),
        (FSDP | {"dynamo_backend": "tvm"}, "no job takes dynamo_backend tvm"),
        (FSDP | {"fp8_config": {"amax_history_length": 16}}, "amax_history_length is read by no"),
        (FSDP | {"fp8_config": {"amax_compute_algorithm": "max"}}, "amax_compute_algorithm is"),
        (FSDP | {"fp8_config": {"optimization_level": "O2"}}, "optimization_level is read by no"),
        (ZERO | MACHINES, "over ssh, by pdsh"),
        (ZERO | MACHINES | zero(deepspeed_multinode_launcher=None), "over ssh, by pdsh"),
        (ZERO | MACHINES | zero(deepspeed_multinode_launcher="slurm"), "are reached by srun"),
        (ZERO | {"fsdp_config": {"fsdp_version": 2}}, "fsdp_config is not read with DEEPSPEED"),
        (ZERO | {"deepspeed_config": {"zero_stage": 0}}, "no job takes zero_stage 0"),
        (ZERO | {"deepspeed_config": {"deepspeed_config_file": "x"}}, "deepspeed_config_file"),
        (ZERO | {"deepspeed_config": {"deepspeed_config_file": "none"}}, "deepspeed_config_file"),
        (ZERO | {"deepspeed_config": {"offload_param_device": "CPU"}}, "offload_param_device CPU"),
        (FSDP | {"parallelism_config": {"parallelism_config_tp_size": 4}}, "config_tp_size"),
        (FSDP | {"mixed_precision": "fp8"}, "mixed_precision fp8"),
        ({"distributed_type": "XLA", "num_processes": 8}, "distributed_type XLA"),
        (FSDP | {"use_cpu": True}, "use_cpu is not read with FSDP"),
        (ZERO | {"use_cpu": True}, "use_cpu is not read with DEEPSPEED"),
    ],
)
def test_traps(config: dict[str, Any], words: str) -> None:
    _, traps = check_config(config, "file")
    ((trap, mend),) = traps
    assert words in trap and mend


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_one_process_on_each_machine_is_no_even_share(kind: str) -> None:
    config = {"distributed_type": kind, "num_processes": 1, "main_process_port": 29500}
    found, ((trap, _),) = check_config(config | MACHINES, "file")
    assert f"{kind}, 2 processes on 2 machines" in found and "each a run of its own" in trap


@pytest.mark.parametrize("kind", ["inclusion", "exclusion"])
def test_a_filter_counts_in_place_of_num_processes(kind: str) -> None:
    filtered = {f"deepspeed_{kind}_filter": "node1:0@node2:0,1"}
    odd = ZERO | MACHINES | {"num_processes": 3}
    found, _ = check_config(odd | zero(**filtered), "file")
    assert "DEEPSPEED, processes as the filter says on 2 machines" in found
    with pytest.raises(JobError, match="multiple of num_machines"):
        check_config(odd | zero(**filtered, deepspeed_multinode_launcher="standard"), "file")


@pytest.mark.parametrize(
    "config",
    [
        ZERO | zero(deepspeed_config_file="x.json"),
        ZERO | zero(offload_param_device="cpu"),
        FSDP | {"dynamo_backend": "EAGER"},
        CPU | {"distributed_type": "MULTI_GPU", "mixed_precision": "fp8"},
    ],
)
def test_no_strategy_is_promised_of_what_no_job_takes(config: dict[str, Any]) -> None:
    found, traps = check_config(config, "file")
    assert "; for" not in found and traps
    assert "ZeRO" not in found or "deepspeed_config_file" not in config["deepspeed_config"]


def test_files_and_the_self_test_are_apart() -> None:
    done = hybrid_command("doctor", "launch/hostfile", "--no-self-test", timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "--no-self-test: valid without FILE" in line


def test_a_command_a_machine_is_no_trap() -> None:
    standard = {"deepspeed_config": {"deepspeed_multinode_launcher": "standard"}}
    found, traps = check_config(ZERO | MACHINES | standard, "file")
    assert "4 processes on 2 machines" in found and traps == []


def test_plain_values_are_read(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text("\ufeffa: {b: [1, 2.5, null, 'no']}\nc: |\n  text\n", encoding="utf-8")
    assert read_yaml(file, "file") == {"a": {"b": [1, 2.5, None, "no"]}, "c": "text\n"}


def test_known_fields_are_accelerate_s() -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import DistributedType

    rows = known_keys()["properties"]
    old = {key for key, row in rows.items() if "now" in row}
    assert old == {"dynamo_backend", "fp16"}
    assert rows.keys() == ClusterConfig.__dataclass_fields__.keys() | old
    assert rows["distributed_type"]["enum"] == [kind.value for kind in DistributedType]


def test_known_keys_of_sections_are_accelerate_s_options() -> None:
    from accelerate.commands.launch import launch_command_parser

    rows = known_keys()["properties"]
    unread = {key for key, row in rows["fp8_config"]["properties"].items() if "meant" in row}
    options = {action.dest: action for action in launch_command_parser()._actions}
    known = {
        section: {name for name in options if name.startswith(prefix)}
        for section, prefix in PREFIXES.items()
    }
    known["fsdp_config"].add("fsdp_ignored_modules")
    known["mpirun_config"].add("bind-to")
    known["fp8_config"] |= {"fp8_use_mxfp8_block_scaling", *unread}
    group = {n for n in options if n.startswith(("zero", "offload_", "gradient_", "deepspeed_"))}
    known["deepspeed_config"] = group
    assert {section: set(rows[section]["properties"]) for section in known} == known
    for section in known:
        for name, row in rows[section]["properties"].items():
            choices = getattr(options.get(name), "choices", None)
            assert "enum" not in row or choices in (None, row["enum"]), name


def test_accelerate_takes_the_shipped_files_and_no_unknown_field(tmp_path: Path) -> None:
    """It does look at fields; a key of a section that it does not know it takes."""
    from accelerate.commands.config import load_config_from_file

    for file in (ROOT / "launch" / "accelerate").iterdir():
        load_config_from_file(str(file))
    file = tmp_path / "typo.yaml"
    file.write_text(yaml.safe_dump(FSDP | {"num_process": 2}))
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(file))
    file.write_text(yaml.safe_dump(FSDP | {"fsdp_config": {"fsdp_verson": 2}}))
    assert load_config_from_file(str(file)).fsdp_config == {"fsdp_verson": 2}
    with pytest.raises(JobError, match="did you mean 'fsdp_version'"):
        list(check_files([file]))


@pytest.mark.parametrize(
    ("release", "refused"), [(None, True), ("1.15.2", True), ("1.16.0", False)]
)
def test_keys_of_another_release_are_left_to_it(
    release: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are checked all the same, and a key that is not known cannot stand for one that is."""
    monkeypatch.setattr(accelerate_files, "package_version", lambda name: release)
    for new in ({"new_field": 1}, fsdp(fsdp_new=1), zero(num_processes="x")):
        config = ZERO | new
        if refused:
            with pytest.raises(JobError, match="unknown key"):
                check_config(config, "file")
        else:
            assert "4 processes on 1 machine" in check_config(config, "file")[0]
    with pytest.raises(JobError, match=r"fsdp_version = 3: .*<= 2"):
        check_config(FSDP | fsdp(fsdp_version=3), "file")
