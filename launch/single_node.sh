#!/usr/bin/env bash
# Trains on all GPUs of this machine, and starts again where that helps.
#
#   launch/single_node.sh --config=configs/tinyllama_1b.py --workdir=runs/tinyllama_1b [...]
#
# Arguments are those of python -m tinyllama_jax.train. SIGTERM, SIGUSR1 and Ctrl-C are passed on:
# training saves, and this ends with 75.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/environment.sh
source launch/environment.sh
# shellcheck source=launch/restart.sh
source launch/restart.sh

python=$(command -v python || command -v python3) || exit

start() {
    "$python" -m tinyllama_jax.train "${arguments[@]}" &
    child=$!
    [[ -n $asked ]] && kill "-$asked" "$child"
    local status=0
    wait_for "$child" || status=$?
    child=""
    return "$status"
}
arguments=("$@")
keep_running start
