#!/usr/bin/env bash
# Several hosts, the deepspeed launcher, with the hosts of a hostfile. From the top folder, either
# once, on the first host, which starts the others over ssh (pdsh must be installed):
#   launch/shell/deepspeed_hosts.sh
# or without ssh on each host, with NODE_RANK 1 on the second, and so on:
#   NODE_RANK=0 MASTER_ADDR=node1 launch/shell/deepspeed_hosts.sh
set -euo pipefail

JOB=${JOB:-launch/jobs/mlp.toml}
STRATEGY=${STRATEGY:-zero2}
HOSTFILE=${HOSTFILE:-launch/hostfile}
MASTER_PORT=${MASTER_PORT:-29500} # free on the first host
OUT=${OUT:-out/deepspeed} # results on the first host, errors of its ranks on each
# Over ssh only PYTHON* and a few more variables travel; others go into ~/.deepspeed_env:
#   GLOO_SOCKET_IFNAME=eth0

words=(--hostfile "$HOSTFILE" --master_port "$MASTER_PORT")
if [ -n "${NODE_RANK:-}" ]; then
  words+=(--no_ssh --node_rank "$NODE_RANK")
  words+=(--master_addr "${MASTER_ADDR:?name or address of the first host}")
fi
exec deepspeed "${words[@]}" \
  --module hybrid train "$JOB" --strategy "$STRATEGY" --out "$OUT" "$@"
