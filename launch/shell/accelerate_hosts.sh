#!/usr/bin/env bash
# Several hosts, accelerate launch. On each host, from the top folder:
#   NODE_RANK=0 MASTER_ADDR=node1 launch/shell/accelerate_hosts.sh
# with NODE_RANK 1 on the second, and so on. The same job file on all of them.
set -euo pipefail

JOB=${JOB:-launch/jobs/mlp.toml}
STRATEGY=${STRATEGY:-ddp}
NUM_NODES=${NUM_NODES:-2}
NPROC=${NPROC:-1} # processes a host: its GPUs
NODE_RANK=${NODE_RANK:?0 on the first host, 1 on the second, and so on}
MASTER_ADDR=${MASTER_ADDR:?name or address of the first host}
MASTER_PORT=${MASTER_PORT:-29500} # free on the first host
OUT=${OUT:-out/accelerate} # results on the first host, errors of its ranks on each
# Where hosts have several networks, the one to use:
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

case $STRATEGY in
  fsdp | zero1 | zero2 | zero3) CONFIG=launch/accelerate/$STRATEGY.yaml ;;
  *) CONFIG=launch/accelerate/ddp.yaml ;; # processes and nothing else
esac

# accelerate counts the processes of all hosts. For zero1 to zero3 it would start the other hosts
# itself over pdsh; "standard" is: one command on each.
exec accelerate launch --config_file "$CONFIG" --num_processes "$((NUM_NODES * NPROC))" \
  --num_machines "$NUM_NODES" --machine_rank "$NODE_RANK" --deepspeed_multinode_launcher standard \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
  -m hybrid train "$JOB" --strategy "$STRATEGY" --out "$OUT" "$@"
