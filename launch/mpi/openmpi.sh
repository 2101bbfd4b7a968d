#!/usr/bin/env bash
# mpirun of Open MPI. From the top folder, on one host:
#   STRATEGY=fsdp NPROC=4 launch/mpi/openmpi.sh --set train.epochs=1
# on several, which mpirun reaches over ssh:
#   HOSTFILE=launch/hostfile MASTER_ADDR=node1 NPROC=4 launch/mpi/openmpi.sh
# Change the values here, or set them before; arguments go to `hybrid train`.
set -euo pipefail

JOB=${JOB:-launch/jobs/mlp.toml}
STRATEGY=${STRATEGY:-ddp}
NPROC=${NPROC:-2}       # processes, over all hosts
HOSTFILE=${HOSTFILE:-}  # several hosts: lines of "HOST slots=NUMBER"
MASTER_PORT=${MASTER_PORT:-29500} # several hosts: free on the first
OUT=${OUT:-out/openmpi} # results on the first host, errors of its ranks on each

# Left to itself, Open MPI binds each rank to one core, whatever its number of threads, and refuses
# more ranks than cores.
words=(-np "$NPROC" --bind-to none --oversubscribe ${OMP_NUM_THREADS:+-x OMP_NUM_THREADS})
if [ -n "$HOSTFILE" ]; then
  export MASTER_ADDR=${MASTER_ADDR:?name or address of the first host} MASTER_PORT
  words+=(--hostfile "$HOSTFILE" -x PATH -x PYTHONPATH -x MASTER_ADDR -x MASTER_PORT)
fi
if [ "$(id -u)" = 0 ]; then words+=(--allow-run-as-root); fi # as in a container
exec "${MPIRUN:-mpirun}" "${words[@]}" \
  python -m hybrid train "$JOB" --strategy "$STRATEGY" --out "$OUT" "$@"
