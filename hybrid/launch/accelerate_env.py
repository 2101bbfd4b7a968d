"""This module holds accelerate's configuration against the job, without torch.

`accelerate launch` passes its configuration to its ranks in environment variables
(accelerate/utils/launch.py). The job decides what a run does: a configuration that contradicts it
is refused, since one of the two would be ignored."""

import os
from collections.abc import Mapping

from ..job.errors import JobError
from ..job.schema import Job

_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
STARTED = "ACCELERATE_MIXED_PRECISION"  # set for every rank, whatever the configuration


def check_configuration(job: Job, strategy: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise JobError where the configuration contradicts the job, and name both."""
    for key, valid in _valid_values(job, strategy).items():
        if key in environ and environ[key].lower() not in valid:
            raise JobError(
                f"strategy = {strategy!r}: accelerate's configuration has {_name_field(key)} = "
                f"{environ[key]!r}; valid with this job: {' or '.join(valid)}"
            )
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ:
        raise JobError(
            "accelerate's configuration has deepspeed_config_file: give the file to the job "
            "instead, as strategy.zero1.ds_config and so on"
        )


def clear_accelerate_variables() -> None:
    """Delete the configuration's environment variables; call `check_configuration` before."""
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


def _name_field(variable: str) -> str:
    """Return the YAML field that an environment variable comes from."""
    name = variable.lower().removeprefix("accelerate_")
    return name.removeprefix("use_").removeprefix("deepspeed_")


def _valid_values(job: Job, strategy: str) -> dict[str, list[str]]:
    """Map each environment variable to the values that agree with the job.

    accelerate's own defaults, which it sets for a field that is left out, agree too."""
    zero = strategy in ("zero1", "zero2", "zero3")
    precision = job.train.precision
    return {
        "ACCELERATE_USE_FSDP": ["true" if strategy == "fsdp" else "false"],
        "ACCELERATE_USE_DEEPSPEED": ["true" if zero else "false"],
        "ACCELERATE_USE_MEGATRON_LM": ["false"],
        STARTED: ["no", *([] if precision == "fp32" else [precision])],
        "ACCELERATE_DYNAMO_BACKEND": ["no", *(["inductor"] if job.train.compile else [])],
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": [strategy.removeprefix("zero")],
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ["1", "auto", str(job.micro_batches(strategy))],
        "ACCELERATE_GRADIENT_CLIPPING": ["none", "auto", str(job.train.clip_norm)],
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ["none"],
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ["none"],
        "FSDP_VERSION": ["2"],
        "FSDP_RESHARD_AFTER_FORWARD": [str(job.strategy.fsdp.reshard_after_forward).lower()],
        "FSDP_OFFLOAD_PARAMS": ["false"],
        "FSDP_ACTIVATION_CHECKPOINTING": [str(job.train.activation_checkpointing).lower()],
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": [str(job.parallel.replicate or 1)],
        "PARALLELISM_CONFIG_TP_SIZE": ["1"],
        "PARALLELISM_CONFIG_CP_SIZE": ["1"],
        "PARALLELISM_CONFIG_SP_SIZE": ["1"],
    }
