#!/usr/bin/env bash
# One host, torchrun. From the top folder:
#   STRATEGY=fsdp NPROC=4 launch/shell/torchrun.sh --set train.epochs=1
# Change the values here, or set them before; arguments go to `hybrid train`.
set -euo pipefail

JOB=${JOB:-launch/jobs/mlp.toml}
STRATEGY=${STRATEGY:-ddp}
NPROC=${NPROC:-2} # processes: as many as GPUs; on CPUs as many as cores, or fewer
OUT=${OUT:-out/torchrun}

# --standalone takes a free port, so that two runs on a host do not meet each other.
exec torchrun --standalone --nproc-per-node "$NPROC" \
  -m hybrid train "$JOB" --strategy "$STRATEGY" --out "$OUT" "$@"
