#!/usr/bin/env bash
# Starts this node's processes; the same command on every node, each with a different NODE_RANK. README.md has the variables.
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/launch/torchrun_static.sh --config run.yaml --save runs/solo
#
# Process 0 is on node 0, and one open port is enough. A process that dies ends the run: torchrun_c10d.sh starts again.
MAX_RESTARTS=${MAX_RESTARTS:-0}
if [[ "$MAX_RESTARTS" != 0 ]]; then
    # torch 2.11 keeps the store, and with it the addresses of the processes that died: those that start again connect
    # to them (StaticTCPRendezvous.next_rendezvous in elastic/rendezvous/static_tcp_rendezvous.py).
    echo "error: MAX_RESTARTS=$MAX_RESTARTS: a static rendezvous cannot start again; use torchrun_c10d.sh" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2034 # read by train
rendezvous=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
train "$@"
