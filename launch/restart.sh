# shellcheck shell=bash
# Which ends of training are started again; sourced by the launchers.
#
#   0   the token budget is spent              75  asked to end, and saved
#   76  a process was lost, or hung            134, 135, 137, 139: it crashed, or was killed
#   others: starting again does not mend it

# Between starts after an end with 76: seconds, doubled each time up to the most; a run that lasted
# as long as `settled` begins with the first again.
first_pause=${FIRST_PAUSE:-5} most_pause=${MOST_PAUSE:-300} settled=600
# Ends with 76 one after another that mean that nothing moves any more.
most_restarts=${MOST_RESTARTS:-20}

say() { printf '%s launch: %s\n' "$(date '+%F %T')" "$*" >&2; }

# Training makes this file once it has gone back to --resume=STEP. Later starts leave that out: they
# would go back each time. The caller may name one that all its processes see.
export TINYLLAMA_REWOUND=${TINYLLAMA_REWOUND:-$(mktemp -u)}

asked="" child=""
# pass_on SIGNAL: to training, which saves and ends with 75; also where it is just being started.
pass_on() {
    asked=$1
    [[ -n $child ]] && kill "-$1" "$child" 2> /dev/null
}
trap 'pass_on TERM' TERM INT HUP
trap 'pass_on USR1' USR1

# drop_rewind: takes --resume and --skip_steps (which the run's config keeps) out of `arguments`.
drop_rewind() {
    local kept=() argument take_next=""
    for argument in "${arguments[@]}"; do
        if [[ -n $take_next ]]; then
            take_next=""
            continue
        fi
        case $argument in
            --resume=* | -resume=* | --skip_steps=* | -skip_steps=*) ;;
            --resume | -resume | --skip_steps | -skip_steps) take_next=1 ;;
            *) kept+=("$argument") ;;
        esac
    done
    arguments=("${kept[@]}")
}

# keep_running START: calls START, again where that helps, and returns its last exit code. A 75 ends
# it where this script was signalled itself ($asked), and is started again where only training was.
keep_running() {
    local start=$1 pause=$first_pause restarts=0 status began
    while true; do
        [[ -e $TINYLLAMA_REWOUND ]] && drop_rewind
        began=$SECONDS status=0
        "$start" || status=$?
        if [[ -n $asked ]]; then
            # 129 and more: by the signal itself, before training listened to it.
            ((status == 76 || status > 128)) && status=75
            return "$status"
        fi
        case $status in
            75)
                say "training was asked to end and has saved; starting it again"
                continue
                ;;
            # Killed or crashed (128 and the signal's number), by a lack of memory perhaps.
            76 | 134 | 135 | 137 | 139) ;;
            *) return "$status" ;;
        esac
        if ((SECONDS - began >= settled)); then
            pause=$first_pause restarts=0
        fi
        if ((++restarts > most_restarts)); then
            say "$most_restarts ends with 76 or a crash one after another: giving up"
            return "$status"
        fi
        say "a process was lost or hung ($status); starting again in $pause s"
        sleep "$pause" &
        wait $! || true
        [[ -n $asked ]] && return 75
        pause=$((pause * 2 < most_pause ? pause * 2 : most_pause))
    done
}

# wait_for PID: its exit code, however often a signal interrupts the waiting.
wait_for() {
    local status
    while true; do
        status=0
        wait "$1" || status=$?
        # An interrupted wait gives the signal's number, and the next one the process's own.
        if ((status > 128)) && kill -0 "$1" 2> /dev/null; then
            continue
        fi
        if ((status > 128)); then
            wait "$1" 2> /dev/null
            local again=$?
            ((again != 127)) && status=$again
        fi
        return "$status"
    done
}
