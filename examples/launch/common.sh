# shellcheck shell=bash
# What torchrun_static.sh and torchrun_c10d.sh share; they source it and set `rendezvous`. README.md has the variables.
# shellcheck disable=SC2154 # rendezvous
set -u

: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_PORT:=29500}" "${GPUS_PER_NODE:=8}" "${MAX_RESTARTS:=3}" "${PYTHON:=python}"
if [[ -z "${MASTER_ADDR:-}" && "$NNODES" != 1 ]]; then
    echo "error: NNODES=$NNODES: set MASTER_ADDR to the host of node 0, the same on every node" >&2
    exit 2
fi
: "${MASTER_ADDR:=127.0.0.1}"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd) || exit 2

WORK_REMAINS=75 # EX_TEMPFAIL of sysexits.h: start the same command again

# torchrun with the options of the array `rendezvous`; arguments are pretrain_solopo.py's.
# Returns 0: all is done; 75: stopped early, saved; else torchrun's status.
#
# SIGUSR1, SIGTERM and SIGINT ask the run to save and end. torchrun must not receive them: it dies of SIGUSR1, and after the
# other two it kills its processes 30 seconds later, saved or not (torch 2.11, PContext.close). So it ignores all three,
# and this shell forwards them to its processes.
train() {
    local agent status logs=()
    if [[ -n "${LOG_DIR:-}" ]]; then # a file for each process; on the terminal its lines begin with rank and host
        export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank \${rank} on $(hostname)] "
        logs=(--log-dir "$LOG_DIR/node$NODE_RANK" --tee 3)
    fi
    SOLOPO_STOPPED_FILE=$(mktemp) || return 2 # the first process of the node writes here when the run stops early
    export SOLOPO_STOPPED_FILE
    trap ':' USR1 TERM INT # ends `wait` below
    (
        trap '' USR1 TERM INT
        exec "$PYTHON" -m megatron_solopo.launch "${rendezvous[@]}" "${logs[@]}" --nnodes "$NNODES" \
            --nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS" --signals-to-handle SIGHUP,SIGQUIT \
            "$repository/pretrain_solopo.py" "$@" --auto-resume --exit-signal-handler
    ) &
    agent=$!
    wait "$agent"
    while kill -0 "$agent" 2>/dev/null; do # then a signal ended the wait, not torchrun
        # Sent again and again: a process that still imports has no handler yet and, like torchrun, ignores the signal.
        signal_children "$agent"
        (trap '' USR1 && exec sleep 2)
    done
    wait "$agent"
    status=$?
    [[ $status == 0 && -s "$SOLOPO_STOPPED_FILE" ]] && status=$WORK_REMAINS
    rm -f "$SOLOPO_STOPPED_FILE"
    return $status
}

# SIGUSR1 to the processes that process $1 started. By /proc, because slim images have no pkill.
signal_children() {
    local file child
    grep -ls "^PPid:[[:space:]]*$1\$" /proc/[0-9]*/status | while read -r file; do
        child=${file#/proc/}
        kill -USR1 "${child%/status}" 2>/dev/null
    done
}
