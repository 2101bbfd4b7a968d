"""Whether an accelerate configuration and the job ask for the same thing. No torch.

`accelerate launch` tells its ranks the configuration in variables (accelerate/utils/launch.py).
What a run does is the job's to say: a configuration that says otherwise is refused, since one of
the two would be ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..job.errors import JobError
from ..job.schema import Job

_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
STARTED = "ACCELERATE_MIXED_PRECISION"  # set for every rank, whatever the configuration


def check_configuration(job: Job, strategy: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise JobError, naming both, where the configuration contradicts the job."""
    for key, (field, valid) in _fields_by_variable(job, strategy).items():
        if key in environ and environ[key].lower() not in valid:
            raise JobError(
                f"strategy = {strategy!r}: accelerate's configuration has {field} = "
                f"{environ[key]!r}; valid with this job: {' or '.join(valid)}"
            )
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ:
        raise JobError(
            "accelerate's configuration has deepspeed_config_file: give the file to the job "
            "instead, as strategy.zero1.ds_config and so on"
        )


def clear_accelerate_variables() -> None:
    """Delete the configuration's environment variables; `check_configuration` comes first."""
    for key in list(os.environ):
        if key.startswith(_PREFIXES):
            del os.environ[key]


def check_started(num_ranks: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise JobError where `accelerate launch` started one process for a run of several."""
    if STARTED in environ and "RANK" not in environ and num_ranks > 1:
        raise JobError(
            f"the run has {num_ranks} processes, and accelerate launch started one, as it does for "
            "distributed_type MULTI_CPU or NO; valid: distributed_type MULTI_GPU (on CPUs too), "
            f"num_processes {num_ranks}"
        )


def _fields_by_variable(job: Job, strategy: str) -> dict[str, tuple[str, list[str]]]:
    """Maps each environment variable to the YAML field it comes from and the values that agree with
    the job. accelerate's own defaults, which it sets for a field that is left out, agree too."""
    zero = strategy in ("zero1", "zero2", "zero3")
    checkpointing = str(job.train.activation_checkpointing).lower()
    precision, replicate = job.train.precision, job.parallel.replicate or 1
    dynamo = ["no", *(["inductor"] if job.train.compile else [])]
    return {
        "ACCELERATE_USE_FSDP": ("fsdp", ["true" if strategy == "fsdp" else "false"]),
        "ACCELERATE_USE_DEEPSPEED": ("deepspeed", ["true" if zero else "false"]),
        "ACCELERATE_USE_MEGATRON_LM": ("megatron_lm", ["false"]),
        STARTED: ("mixed_precision", ["no", *([] if precision == "fp32" else [precision])]),
        "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", dynamo),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", [strategy.removeprefix("zero")]),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "gradient_accumulation_steps",
            ["1", "auto", str(job.micro_batches(strategy))],
        ),
        "ACCELERATE_GRADIENT_CLIPPING": (
            "gradient_clipping",
            ["none", "auto", str(job.train.clip_norm)],
        ),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("offload_optimizer_device", ["none"]),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", ["none"]),
        "FSDP_VERSION": ("fsdp_version", ["2"]),
        "FSDP_RESHARD_AFTER_FORWARD": (
            "fsdp_reshard_after_forward",
            [str(job.strategy.fsdp.reshard_after_forward).lower()],
        ),
        "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", ["false"]),
        "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", [checkpointing]),
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": (
            "parallelism_config_dp_replicate_size",
            [str(replicate)],
        ),
        **{
            f"PARALLELISM_CONFIG_{axis}_SIZE": (f"parallelism_config_{axis.lower()}_size", ["1"])
            for axis in ("TP", "CP", "SP")
        },
    }
