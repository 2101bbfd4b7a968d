#!/usr/bin/env bash
# mpirun of MPICH (Hydra). From the top folder, on one host:
#   STRATEGY=fsdp NPROC=4 launch/mpi/mpich.sh --set train.epochs=1
# on several, which mpirun reaches over ssh:
#   HOSTFILE=launch/hostfile MASTER_ADDR=node1 NPROC=4 launch/mpi/mpich.sh
# Change the values here, or set them before; arguments go to `hybrid train`.
set -euo pipefail

JOB=${JOB:-launch/jobs/mlp.toml}
STRATEGY=${STRATEGY:-ddp}
NPROC=${NPROC:-2}      # processes, over all hosts
HOSTFILE=${HOSTFILE:-} # several hosts: lines of "HOST slots=NUMBER"
MASTER_PORT=${MASTER_PORT:-29500} # several hosts: free on the first
OUT=${OUT:-out/mpich} # results on the first host, errors of its ranks on each

words=(-np "$NPROC")
if [ -n "$HOSTFILE" ]; then
  export MASTER_ADDR=${MASTER_ADDR:?name or address of the first host} MASTER_PORT
  hosts=$(sed -nE 's/^([^#[:space:]]+) +slots=([0-9]+).*/\1:\2/p' "$HOSTFILE" | paste -sd,)
  words+=(-hosts "$hosts") # MPICH hands the environment on by itself
fi
exec "${MPIRUN:-mpirun}" "${words[@]}" \
  python -m hybrid train "$JOB" --strategy "$STRATEGY" --out "$OUT" "$@"
