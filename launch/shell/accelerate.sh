#!/usr/bin/env bash
# One host, accelerate launch, with the configuration in launch/accelerate/ that fits the strategy.
# From the top folder:
#   STRATEGY=fsdp NPROC=4 launch/shell/accelerate.sh --set train.epochs=1
# Change the values here, or set them before; arguments go to `hybrid train`.
set -euo pipefail

JOB=${JOB:-launch/jobs/mlp.toml}
STRATEGY=${STRATEGY:-ddp}
NPROC=${NPROC:-2} # processes: as many as GPUs; on CPUs as many as cores, or fewer
OUT=${OUT:-out/accelerate}

case $STRATEGY in
  fsdp | zero1 | zero2 | zero3) CONFIG=launch/accelerate/$STRATEGY.yaml ;;
  *) CONFIG=launch/accelerate/ddp.yaml ;; # processes and nothing else
esac

exec accelerate launch --config_file "$CONFIG" --num_processes "$NPROC" \
  -m hybrid train "$JOB" --strategy "$STRATEGY" --out "$OUT" "$@"
