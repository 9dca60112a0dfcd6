#!/usr/bin/env bash
# Trains on all GPUs of several machines over ssh, one process on each, and starts all again where
# that helps.
#
#   launch/multi_node.sh HOSTS --config=configs/tinyllama_1b.py --workdir=/shared/runs/1b [...]
#
# HOSTS is a file with a host per line; the first also coordinates. All see this directory, the run
# directory and the prepared data under the same paths, and can be reached by ssh without a password.
# What a process prints goes to LOGS/<number>.<host>.log (LOGS: logs by default). PORT (8476) must be
# open on the first host. SIGTERM, SIGUSR1 and Ctrl-C are passed on: training saves, and this ends
# with 75.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

if (($# < 1)) || [[ ! -f $1 ]]; then
    printf 'usage: launch/multi_node.sh HOSTS --config=FILE [...], HOSTS a file with a host per line\n' >&2
    exit 2
fi
mapfile -t hosts < <(grep -v '^[[:space:]]*\(#\|$\)' "$1")
shift
if ((${#hosts[@]} == 0)); then
    printf 'no hosts in the file\n' >&2
    exit 2
fi
python=$(command -v python || command -v python3) || exit
logs=${LOGS:-logs}
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
coordinator=${COORDINATOR:-${hosts[0]}}:${PORT:-8476}
read -ra remote_shell <<< "${REMOTE_SHELL:-ssh -o BatchMode=yes}"

# on NUMBER COMMAND: runs a shell command on that process's host.
on() { "${remote_shell[@]}" "${hosts[$1]}" "$2" < /dev/null; }

# signal_all SIGNAL: ssh passes no signals on, so each process left its number in a file.
signal_all() {
    local number
    for number in "${!hosts[@]}"; do
        [[ -f $logs/$number.pid ]] &&
            on "$number" "kill -$1 \$(cat $(printf %q "$logs/$number.pid")) 2>/dev/null" &
    done
}
export TINYLLAMA_REWOUND=$logs/rewound
rm -f "$TINYLLAMA_REWOUND"
# shellcheck source=launch/restart.sh
source launch/restart.sh
# In place of the one that knows a single process on this machine. jax tells the others.
pass_on() {
    asked=$1
    signal_first "$1" &
}
# signal_first SIGNAL: to process 0, when it has started.
signal_first() {
    local waited
    for ((waited = 0; waited < 120; waited++)); do
        if [[ -f $logs/0.pid ]]; then
            on 0 "kill -$1 \$(cat $(printf %q "$logs/0.pid"))"
            return
        fi
        sleep 1
    done
}
# ssh hands no variables on.
handed_on=""
for name in $(compgen -e | grep -E '^(JAX|XLA|NCCL|TINYLLAMA|CUDA)_|^(DETERMINISTIC|TF_CPP_MIN_LOG_LEVEL)$'); do
    handed_on+=" $name=$(printf %q "${!name}")"
done

# start: one process on each host; returns how the run ended.
start() {
    local number command pids=() status worst=0 first_error=""
    rm -f "$logs"/*.pid
    for number in "${!hosts[@]}"; do
        command="cd $(printf %q "$PWD") && export$handed_on && source launch/environment.sh &&"
        command+=" export JAX_COORDINATOR_ADDRESS=$coordinator JAX_NUM_PROCESSES=${#hosts[@]}"
        command+=" JAX_PROCESS_ID=$number && echo \$\$ > $(printf %q "$logs/$number.pid") &&"
        command+=" exec $(printf '%q ' "$python" -m tinyllama_jax.train "${arguments[@]}")"
        on "$number" "bash -c $(printf %q "$command")" \
            >> "$logs/$number.${hosts[$number]}.log" 2>&1 &
        pids+=($!)
    done
    for number in "${!pids[@]}"; do
        status=0
        wait_for "${pids[$number]}" || status=$?
        case $status in
            0) ;;
            75) ((worst == 0)) && worst=75 ;;
            # 255: ssh itself; above 128: killed from outside, the machine's memory perhaps. The
            # others notice within watchdog.peer_seconds, and end with 76.
            76 | 134 | 135 | 137 | 139 | 143 | 255) worst=76 ;;
            *)
                if [[ -z $first_error ]]; then
                    first_error=$status
                    say "process $number on ${hosts[$number]} ended with $status; see" \
                        "$logs/$number.${hosts[$number]}.log"
                    signal_all KILL
                fi
                ;;
        esac
    done
    rm -f "$logs"/*.pid # a number may be another's by the next start
    return "${first_error:-$worst}"
}

arguments=("$@")
keep_running start
