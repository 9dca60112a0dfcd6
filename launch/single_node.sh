#!/usr/bin/env bash
# Trains on all GPUs of this machine, and starts again where that helps.
#
#   launch/single_node.sh --config=configs/tinyllama_1b.py --workdir=runs/tinyllama_1b [...]
#
# Arguments are those of python -m tinyllama_jax.train. SIGTERM and SIGUSR1 are passed on: training
# saves, and this ends with 75.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/environment.sh
source launch/environment.sh
# shellcheck source=launch/restart.sh
source launch/restart.sh

python=$(command -v python || command -v python3) || exit
asked="" child=""
pass_on() {
    asked=$1
    [[ -n $child ]] && kill "-$1" "$child" 2> /dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1

start() {
    "$python" -m tinyllama_jax.train "${arguments[@]}" &
    child=$!
    local status=0
    wait_for "$child" || status=$?
    child=""
    return "$status"
}
arguments=("$@")
keep_running start
