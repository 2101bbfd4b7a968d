"""DeepSpeed configuration files: what DeepSpeed alone owns; the rest comes from the job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import Job, JobError
from .base import Unsupported

# What the job says for every strategy alike. A file that says it too would win or lose in silence.
OWNED_BY_JOB = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch and train.micro_batches",
    "gradient_accumulation_steps": "train.micro_batches",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "[optimizer]",
    "scheduler": "[schedule]",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.precision",
}


def load(name: str, stage: int) -> dict[str, Any]:
    """The configuration in a file, or in the shipped `ds_configs/NAME.json`; JobError where it
    cannot be read, says what the job says, or asks for another ZeRO stage than `stage`."""
    path = Path(name) if name.endswith(".json") else _shipped(name)
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise JobError(f"ds_config = {name!r}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise JobError(f"ds_config = {name!r}: not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise JobError(f"ds_config = {name!r}: holds a {type(config).__name__}, not an object")
    for key in config.keys() & OWNED_BY_JOB.keys():
        raise JobError(f"ds_config = {name!r}: {key}: set {OWNED_BY_JOB[key]} in the job instead")
    zero = config.get("zero_optimization", {})
    found = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if found != stage:
        raise JobError(
            f"ds_config = {name!r}: zero_optimization.stage = {found}: this strategy needs {stage}"
        )
    return config


def _shipped(name: str) -> Path:
    """In a checkout `ds_configs/` lies beside the package, in a wheel inside it."""
    package = Path(__file__).parent.parent
    inside = package / "ds_configs" / f"{name}.json"
    return inside if inside.exists() else package.parent / "ds_configs" / f"{name}.json"


def check_precision(job: Job) -> list[str]:
    """Raise Unsupported for fp16 where DeepSpeed refuses it: on CPUs without fp16 units."""
    if job.train.precision == "fp16":
        import torch

        if not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            raise Unsupported(
                "train.precision = 'fp16': DeepSpeed takes it on GPUs and on CPUs with fp16 units "
                "only, and this CPU has none; bf16 runs here"
            )
    return []
