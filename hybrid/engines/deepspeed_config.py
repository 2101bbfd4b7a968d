"""This module checks DeepSpeed configuration files, which hold what DeepSpeed alone owns.

The job says the rest. DeepSpeed ignores unknown keys of a file silently. Here each key must be in
`deepspeed_keys.json`, which `python -m tests.deepspeed_keys` writes from the installed DeepSpeed.
The module needs no torch."""

import json
from pathlib import Path
from typing import Any

from ..job.errors import JobError, Unsupported
from ..job.known_keys import problem
from ..job.reading import read_json
from ..job.schema import Job
from ..job.strategy_settings import Stages

# What the job says for every strategy alike. A file that said it too would win or lose silently.
OWNED_BY_JOB = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch and train.micro_batches",
    "gradient_accumulation_steps": "train.micro_batches",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "[optimizer]",
    "scheduler": "[schedule]",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "data_types": "train.precision",
    "torch_autocast": "train.precision",
    "communication_data_type": "train.precision",
    "data_efficiency": "[data]",
}
# What would be overwritten, or would start another run than the job's.
NOT_HERE = {
    "steps_per_print": "steps are shown and written by the run itself",
    "zero_allow_untested_optimizer": "it is always set here",
    "managed_gradient_accumulation": "every step is a whole optimizer step here",
    "tensor_parallel": "no strategy here splits tensors",
    "expert_parallel": "no strategy here places experts",
    "hybrid_engine": "it generates text with another engine",
    "autotuning": "it starts runs of its own",
}
# With these, DeepSpeed keeps state in files, in an optimizer of its own, or in a few bits.
NOT_SAVED = ("zenflow", "zero_quantized_nontrainable_weights")
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "pipeline": 0}  # the job has the stage of 2d
SHIPPED = (*STAGES, "2d")
# What the ranks of every strategy on DeepSpeed import, the last three where an engine is made.
MODULES = (
    "hybrid.engines.deepspeed_setup:import_deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.utils.pin_memory",
)
KEYS_FILE = Path(__file__).parent / "deepspeed_keys.json"


def check_ds_config(job: Job, strategy: str) -> None:
    """Raise JobError if the `ds_config` in a strategy's section of the job is wrong."""
    settings = job.settings(strategy)
    path = getattr(settings, "ds_config", None)
    if path is not None:
        stage = job.strategy.two_d.zero_stage if strategy == "2d" else STAGES[strategy]
        config = load_ds_config(path, stage)
        if isinstance(settings, Stages) and config.get("wall_clock_breakdown"):
            raise JobError(
                f"ds_config = {path!r}: wall_clock_breakdown = true: with it DeepSpeed's pipeline "
                "fails in its first step, where it starts a timer twice; valid: false"
            )


def check_saved(job: Job, strategy: str) -> None:
    """Raise Unsupported where checkpoints are asked for of a state that DeepSpeed keeps apart."""
    path = getattr(job.settings(strategy), "ds_config", None)
    if path is None or job.checkpoint.every is None:
        return
    zero = load_ds_config(path, STAGES[strategy]).get("zero_optimization", {})
    found = [key for key in NOT_SAVED if zero.get(key)]
    for key in ("offload_optimizer", "offload_param"):
        found += [f"{key}.device"] if (zero.get(key) or {}).get("device") == "nvme" else []
    if found:
        raise Unsupported(
            f"ds_config = {path!r}: zero_optimization.{found[0]}: a checkpoint cannot read what "
            "DeepSpeed then keeps; leave it out, or checkpoint.every"
        )


def load_ds_config(name: str, stage: int) -> dict[str, Any]:
    """Read a file, or the shipped `ds_configs/NAME.json`, which must ask for ZeRO stage `stage`.
    Raises JobError if it asks for another stage, or where `read_json` or `stage_of` does."""
    where = f"ds_config = {name!r}"
    config = read_json(_find_shipped(name) if name in SHIPPED else Path(name), where)
    found = stage_of(config, where)
    if found != stage:
        raise JobError(f"{where}: zero_optimization.stage = {found}: this strategy needs {stage}")
    _require_even(config, where)
    return config


def _require_even(config: dict[str, Any], where: str) -> None:
    """Raise JobError for an odd size, which DeepSpeed finds where its ranks are running."""
    size = config.get("zero_optimization", {}).get("allgather_bucket_size", 0)
    if size % 2:
        key = f"zero_optimization.allgather_bucket_size = {size}"
        raise JobError(f"{where}: {key}: valid: an even number, by DeepSpeed")


def stage_of(config: Any, where: str) -> int:
    """Return the ZeRO stage that a configuration asks for.

    Raises JobError, with a text that begins with `where`, if the configuration has a key or value
    that DeepSpeed does not know, or one that the job sets."""
    if not isinstance(config, dict):
        raise JobError(f"{where}: holds a {type(config).__name__}, not an object")
    for key in config.keys() & OWNED_BY_JOB.keys():
        raise JobError(f"{where}: {key}: set {OWNED_BY_JOB[key]} in the job instead")
    for key in config.keys() & NOT_HERE.keys():
        raise JobError(f"{where}: {key}: may not be set: {NOT_HERE[key]}")
    table = json.loads(KEYS_FILE.read_text())
    if wrong := problem(config, table | {"type": ["object"]}):
        raise JobError(f"{where}: {wrong} (by DeepSpeed {table['deepspeed']})")
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _find_shipped(name: str) -> Path:
    """Return the path of a shipped file: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent.parent
    inside = package / "ds_configs" / f"{name}.json"
    return inside if inside.exists() else package.parent / "ds_configs" / f"{name}.json"


def check_fp16(job: Job) -> None:
    """Raise Unsupported for fp16 where DeepSpeed refuses it: on CPUs without fp16 units."""
    if job.train.precision == "fp16":
        import torch

        on_gpu = job.launch.device != "cpu" and torch.cuda.is_available()
        if not on_gpu and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            raise Unsupported(
                "train.precision = 'fp16': DeepSpeed takes it on GPUs and on CPUs with fp16 units "
                "only, and this CPU has none; bf16 runs here"
            )
