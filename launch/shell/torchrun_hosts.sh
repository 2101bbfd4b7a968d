#!/usr/bin/env bash
# Several hosts, torchrun. On each host, from the top folder:
#   NODE_RANK=0 MASTER_ADDR=node1 launch/shell/torchrun_hosts.sh
# with NODE_RANK 1 on the second, and so on. The same job file on all of them.
set -euo pipefail

JOB=${JOB:-launch/jobs/mlp.toml}
STRATEGY=${STRATEGY:-ddp}
NUM_NODES=${NUM_NODES:-2}
NPROC=${NPROC:-1} # processes a host: its GPUs
NODE_RANK=${NODE_RANK:?0 on the first host, 1 on the second, and so on}
MASTER_ADDR=${MASTER_ADDR:?name or address of the first host}
MASTER_PORT=${MASTER_PORT:-29500} # free on the first host
OUT=${OUT:-out/torchrun} # results on the first host, errors of its ranks on each
# Where hosts have several networks, the one to use:
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

exec torchrun --nnodes "$NUM_NODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
  -m hybrid train "$JOB" --strategy "$STRATEGY" --out "$OUT" "$@"
