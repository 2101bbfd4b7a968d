#!/usr/bin/env bash
# One host, the deepspeed launcher. From the top folder:
#   STRATEGY=pipeline NPROC=4 launch/shell/deepspeed.sh --set train.epochs=1
# Change the values here, or set them before; arguments go to `hybrid train`.
set -euo pipefail

JOB=${JOB:-launch/jobs/mlp.toml}
STRATEGY=${STRATEGY:-zero2}
NPROC=${NPROC:-2} # processes: as many as GPUs; on CPUs as many as cores, or fewer
OUT=${OUT:-out/deepspeed}
MASTER_PORT=${MASTER_PORT:-29500} # each run on a host needs its own

# Without --num_gpus, deepspeed starts one process on a host that has no GPU.
exec deepspeed --num_gpus "$NPROC" --master_port "$MASTER_PORT" \
  --module hybrid train "$JOB" --strategy "$STRATEGY" --out "$OUT" "$@"
