"""Which keys an accelerate configuration may hold, read off the installed accelerate's source.

Importing accelerate imports torch, so the source is parsed and nothing of it is run. Fields of the
file are those of its `ClusterConfig`; keys of a section are options of `accelerate launch`, which
takes them over as if they had been typed (`_validate_launch_command`). The table is one of
`hybrid/known_keys.py`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config import JobError

Row = dict[str, Any]
# What the options of a section begin with. deepspeed_config's have a group of their own instead.
PREFIXES = {
    "fsdp_config": "fsdp_",
    "fp8_config": "fp8_",
    "dynamo_config": "dynamo_",
    "parallelism_config": "parallelism_config_",
    "megatron_lm_config": "megatron_lm_",
    "mpirun_config": "mpirun_",
}
_DEEPSPEED_GROUP = "deepspeed_args"
_TRUTH = {"type": ["boolean"], "words": ["true", "false"]}
_MAYBE_TRUTH = {"type": ["boolean", "null"], "words": ["true", "false"]}
_TYPED = {"type": ["boolean"], "words": ["no", "yes"]}  # as `accelerate config` is answered
_TEXT = {"type": ["string", "null"]}
_COUNT = {"type": ["whole number"], "minimum": 1}
_DEVICE = {"type": ["null"], "words": ["none", "cpu", "nvme"]}
_TYPES = {"int": "whole number", "float": "number", "str": "string", "bool": "boolean"}
# What the types of the fields and options do not say; accelerate finds it out later, or never.
_NARROWER: dict[str, Row] = {
    # SageMaker's configurations have other fields, and start nothing where this toolkit is.
    "compute_environment": {"type": ["string"], "enum": ["LOCAL_MACHINE"]},
    "num_processes": _COUNT | {"words": [-1]},  # accelerate's own: --num_processes has to say it
    "num_machines": _COUNT,
    "machine_rank": {"type": ["whole number"], "minimum": 0},
    "main_process_port": {"type": ["whole number", "null"], "minimum": 0, "maximum": 65535},
    "downcast_bf16": _TYPED,
    "tpu_use_sudo": _TYPED,
    # Ranks are told these as text.
    "zero_stage": {
        "type": ["whole number", "null"],
        "minimum": 0,
        "maximum": 3,
        "quoted": True,
    },
    "gradient_accumulation_steps": {
        "type": ["whole number", "null"],
        "minimum": 1,
        "words": ["auto"],
        "quoted": True,
    },
    "gradient_clipping": {
        "type": ["number", "null"],
        "minimum": 0,
        "words": ["auto"],
        "quoted": True,
    },
    "offload_optimizer_device": _DEVICE,
    "offload_param_device": _DEVICE,
    "zero3_init_flag": _MAYBE_TRUTH,
    "zero3_save_16bit_model": _MAYBE_TRUTH,
    "fsdp_version": {"type": ["whole number"], "minimum": 1, "maximum": 2, "quoted": True},
    "fp8_backend": {"type": ["null"], "words": ["TE", "MSAMP", "AO"]},
    **{
        f"parallelism_config_{axis}_size": _COUNT
        for axis in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    },
    "parallelism_config_sp_seq_length": {"type": ["whole number", "string", "null"]},
}
# Choices that are lists in accelerate/utils/constants.py, under these names, and up to which number
# each may be one of torch's instead.
_LISTED = {
    "fsdp_sharding_strategy": 5,
    "fsdp_auto_wrap_policy": 0,
    "fsdp_backward_prefetch": 2,
    "fsdp_state_dict_type": 3,
}
# Fields that `process_config` turns into those beside them, over what is written there.
OLD = {"dynamo_backend": "dynamo_config", "fp16": "mixed_precision"}
# Written by `accelerate config`, and read by nothing: the option that was meant.
UNREAD = {
    "fp8_amax_history_length": "fp8_amax_history_len",
    "fp8_amax_compute_algorithm": "fp8_amax_compute_algo",
    "fp8_optimization_level": "fp8_opt_level",
}
# Taken over by accelerate/utils/launch.py, and no option.
_NO_OPTIONS: dict[str, dict[str, Row]] = {
    "fsdp_config": {"fsdp_ignored_modules": _TEXT},
    "mpirun_config": {"bind-to": _TEXT},
    "fp8_config": {"fp8_use_mxfp8_block_scaling": _TRUTH, **{name: {} for name in UNREAD}},
}


def table() -> Row:
    """The table, with accelerate's release as `accelerate`. ModuleNotFoundError without accelerate,
    JobError where its source is not laid out as the releases that this was made for."""
    spec = importlib.util.find_spec("accelerate")  # finds the package, does not import it
    if spec is None or not spec.submodule_search_locations:
        problem = "accelerate is not installed: its source says what a configuration may hold"
        raise ModuleNotFoundError(problem, name="accelerate")
    release = metadata.version("accelerate")
    try:
        rows = _rows(Path(spec.submodule_search_locations[0]))
    except (OSError, KeyError) as error:
        problem = f"its source cannot be read as that of 1.15: {error}"
        raise JobError(f"accelerate {release}: {problem}") from None
    return {"type": ["object"], "properties": rows, "accelerate": release}


def _rows(root: Path) -> dict[str, Row]:
    """The fields, from accelerate's folder."""
    enums = _enums(_parse(root / "utils/dataclasses.py"))
    lists = _lists(_parse(root / "utils/constants.py"))
    narrower = _narrower(enums, lists)
    options = list(_options(_parse(root / "commands/launch.py"), lists))
    rows = dict(_fields(_parse(root / "commands/config/config_args.py")))
    for section in (*PREFIXES, "deepspeed_config"):
        found = {name: row for group, name, row in options if _is_of(section, group, name)}
        found |= _NO_OPTIONS.get(section, {})
        inner = {name: narrower.get(name, row) for name, row in found.items()}
        rows[section] = {"type": rows[section]["type"], "properties": inner}
    rows |= {name: {"type": ["boolean"]} for name in OLD}
    return {name: narrower.get(name, row) for name, row in rows.items()}


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _narrower(enums: dict[str, list[str]], lists: dict[str, list[str]]) -> dict[str, Row]:
    reshard = [*_TRUTH["words"], *lists["FSDP_SHARDING_STRATEGY"]]  # of FSDP 2, and of FSDP 1
    return _NARROWER | {
        "distributed_type": {"type": ["string"], "enum": enums["DistributedType"]},
        "mixed_precision": {"type": ["null"], "words": enums["PrecisionType"]},
        "dynamo_backend": {"type": ["null"], "words": enums["DynamoBackend"]},
        "fsdp_reshard_after_forward": {"type": ["boolean"], "words": reshard},
        "deepspeed_multinode_launcher": {
            "type": ["string", "null"],
            "enum": lists["DEEPSPEED_MULTINODE_LAUNCHERS"],
        },
        **{name: _listed(lists[name.upper()], last) for name, last in _LISTED.items()},
    }


def _listed(words: list[str], last: int) -> Row:
    if not last:
        return {"type": ["null"], "words": words}
    numbers = {"type": ["whole number", "null"], "minimum": 1, "maximum": last}
    return numbers | {"words": words, "quoted": True}


def _is_of(section: str, group: str, name: str) -> bool:
    if section == "deepspeed_config":
        return group == _DEEPSPEED_GROUP
    return name.startswith(PREFIXES[section])


def _fields(tree: ast.Module) -> Iterator[tuple[str, Row]]:
    """The fields of the two classes that a configuration becomes."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name not in ("BaseConfig", "ClusterConfig"):
            continue
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                written = ast.unparse(line.annotation)
                inner = written.removeprefix("Optional[").removesuffix("]")
                types = [_TYPES.get(inner, "object" if inner == "dict" else "array")]
                optional = inner != written and written.startswith("Optional")
                if optional or (line.value and ast.unparse(line.value) == "None"):
                    types.append("null")
                yield line.target.id, {"type": types}


def _options(tree: ast.Module, lists: dict[str, list[str]]) -> Iterator[tuple[str, str, Row]]:
    """Group, name and row of each `GROUP.add_argument("--name", ...)`."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        words = [a.value for a in node.args if isinstance(a, ast.Constant)]
        names = [str(word)[2:] for word in words if str(word).startswith("--")]
        if node.func.attr == "add_argument" and names:
            given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            yield ast.unparse(node.func.value), names[0], _option_row(given, lists)


def _option_row(given: dict[str, str], lists: dict[str, list[str]]) -> Row:
    """The row of an option from its keywords, as they are written."""
    default, kind = given.get("default", "None"), given.get("type", "str")
    if given.get("action") == "'store_true'" or default in ("'true'", "'false'"):
        return _TRUTH
    if kind not in _TYPES:  # a function: what it takes is not to be read off
        return {}
    row: Row = {"type": [_TYPES[kind], *(["null"] if default == "None" else [])]}
    if "(true|false)" in given.get("help", ""):
        row["type"].append("boolean")
    choices = given.get("choices")
    if choices in lists:
        row["enum"] = lists[choices]
    elif choices and choices.startswith("['") and choices.endswith("']"):
        row["enum"] = ast.literal_eval(choices)
    return row


def _enums(tree: ast.Module) -> dict[str, list[str]]:
    """The values of each class of texts."""
    return {
        node.name: [
            line.value.value
            for line in node.body
            if isinstance(line, ast.Assign)
            and isinstance(line.value, ast.Constant)
            and isinstance(line.value.value, str)
        ]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _lists(tree: ast.Module) -> dict[str, list[str]]:
    """The lists of texts that a file names."""
    return {
        ast.unparse(node.targets[0]): [ast.literal_eval(e) for e in node.value.elts]
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.List)
        and all(isinstance(e, ast.Constant) for e in node.value.elts)
    }
