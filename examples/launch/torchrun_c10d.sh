#!/usr/bin/env bash
# Starts this node's processes; the same command on every node, with NODE_RANK 0 on the host MASTER_ADDR. README.md has
# the variables.
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/launch/torchrun_c10d.sh --config run.yaml --save runs/solo
#
# When a process or a whole node dies, all nodes start their processes again, up to MAX_RESTARTS times, and resume from the
# last checkpoint.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Without this, torch 2.11 hands the store of the first start to all later ones (_bootstrap_store_info in
# elastic/rendezvous/dynamic_rendezvous.py): processes that start again find the addresses of those that died there, and a
# node that comes anew waits for a key that nobody writes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
: "${RDZV_ID:=solopo}" "${RDZV_TIMEOUT:=900}"
is_host=0
[[ "$NODE_RANK" == 0 ]] && is_host=1 # set, not guessed from MASTER_ADDR, which may be an alias or a virtual address
# shellcheck disable=SC2034 # read by train
rendezvous=(
    --rdzv-backend c10d --rdzv-id "$RDZV_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"
    --rdzv-conf "is_host=$is_host,read_timeout=$RDZV_TIMEOUT,join_timeout=$RDZV_TIMEOUT${RDZV_CONF:+,$RDZV_CONF}"
)
train "$@"
