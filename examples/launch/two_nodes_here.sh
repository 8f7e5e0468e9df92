#!/usr/bin/env bash
# Rehearses the loss of a node on one machine, as root: two network namespaces joined by a virtual cable are two nodes,
# each with its own host name, home, cache and folder for temporary files. They train by torchrun_c10d.sh. After the
# second checkpoint node 1 is lost for good: first its cable, so that no connection is closed, then its processes. Node 0
# continues with its ranks alone, from the last checkpoint.
#
#     FOLDER=/tmp/two examples/launch/two_nodes_here.sh --config run.yaml --save runs/two --save-interval 5
#
# Arguments are pretrain_solopo.py's. FOLDER holds what each node has for itself: node0 and node1. Other variables:
# GPUS_PER_NODE (processes of a node, here 2), and those of torchrun_c10d.sh but NNODES, NODE_RANK and MASTER_ADDR.
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 2
folder=$(mkdir -p "${FOLDER:?a folder for what each node has for itself}" && cd "$FOLDER" && pwd) || exit 2
for ((i = 1; i <= $#; i++)); do
    [[ "${!i}" == --save ]] && next=$((i + 1)) && save=${!next}
    [[ "${!i}" == --save=* ]] && save=${!i#--save=}
done
if [[ -z "${save:-}" ]]; then
    echo "error: --save: name the run folder here, not in a file" >&2
    exit 2
fi
names=(solopo-node0 solopo-node1)

clean() {
    local name
    for name in "${names[@]}"; do
        ip netns pids "$name" 2>/dev/null | xargs -r kill -KILL 2>/dev/null
        ip netns delete "$name" 2>/dev/null
    done
}
trap clean EXIT
trap 'exit 130' INT TERM

ip netns add "${names[0]}" && ip netns add "${names[1]}" || exit 2
ip link add solopo0 netns "${names[0]}" type veth peer name solopo1 netns "${names[1]}" || exit 2
for node in 0 1; do
    ip -n "${names[node]}" address add "10.231.0.$((node + 1))/24" dev "solopo$node"
    ip -n "${names[node]}" link set "solopo$node" up
    ip -n "${names[node]}" link set lo up
    mkdir -p "$folder/node$node/home" "$folder/node$node/tmp"
done

# Becomes node $1; the rest of the arguments are options of the run.
start() {
    local node=$1
    shift
    export HOME="$folder/node$node/home" TMPDIR="$folder/node$node/tmp" NNODES=1:2 NODE_RANK=$node
    export MASTER_ADDR=10.231.0.1 PET_LOCAL_ADDR=10.231.0.$((node + 1)) GPUS_PER_NODE=${GPUS_PER_NODE:-2}
    export GLOO_SOCKET_IFNAME=solopo$node NCCL_SOCKET_IFNAME=solopo$node
    # shellcheck disable=SC2016 # the inner shell's
    exec ip netns exec "${names[node]}" unshare --uts bash -c 'hostname "$1" && exec bash "${@:2}"' \
        node "node$node" "$here/torchrun_c10d.sh" "$@"
}

say() { echo "$(date +%T) two_nodes_here: $*" >&2; }

start 0 "$@" &
first=$!
start 1 "$@" &
second=$!
latest="$save/latest_checkpointed_iteration.txt"
before=$(cat "$latest" 2>/dev/null || true)
seen=0
while ((seen < 2)); do
    if ! kill -0 "$first" 2>/dev/null || ! kill -0 "$second" 2>/dev/null; then
        say "a node ended before its second checkpoint; set a smaller --save-interval"
        exit 2
    fi
    now=$(cat "$latest" 2>/dev/null || true)
    [[ "$now" != "$before" ]] && before=$now && ((seen++))
    sleep 0.2
done
say "node 1 is lost after the checkpoint of step $before"
ip -n "${names[1]}" link set solopo1 down
ip netns pids "${names[1]}" | xargs -r kill -KILL
wait "$second" 2>/dev/null
wait "$first"
status=$?
say "node 0 ended with $status; the last checkpoint is that of step $(cat "$latest")"
exit $status
