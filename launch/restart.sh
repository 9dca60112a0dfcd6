# shellcheck shell=bash
# Which ends of training are started again; sourced by the launchers.
#
#   0   the token budget is spent              75  asked to end, and saved
#   76  a process was lost, or hung            137: it was killed from outside
#   others: starting again does not mend it

# Between starts after an end with 76: seconds, doubled each time up to the most; a run that lasted
# as long as `settled` begins with the first again.
first_pause=${FIRST_PAUSE:-5} most_pause=${MOST_PAUSE:-300} settled=600
# Ends with 76 one after another that mean that nothing moves any more.
most_restarts=${MOST_RESTARTS:-20}

say() { printf '%s launch: %s\n' "$(date '+%F %T')" "$*" >&2; }

# keep_running START: calls START, again where that helps, and returns its last exit code. A 75 ends
# it where this script was signalled itself ($asked), and is started again where only training was.
keep_running() {
    local start=$1 pause=$first_pause restarts=0 status began
    while true; do
        began=$SECONDS status=0
        "$start" || status=$?
        case $status in
            75)
                [[ -n ${asked:-} ]] && return 75
                say "training was asked to end and has saved; starting it again"
                continue
                ;;
            76 | 137) ;; # 137: killed from outside, by the machine's lack of memory perhaps
            *) return "$status" ;;
        esac
        [[ -n ${asked:-} ]] && return 75
        if ((SECONDS - began >= settled)); then
            pause=$first_pause restarts=0
        fi
        if ((++restarts > most_restarts)); then
            say "$most_restarts ends with 76 one after another: giving up"
            return 76
        fi
        say "a process was lost or hung; starting again in $pause s"
        sleep "$pause" &
        wait $! || true
        [[ -n ${asked:-} ]] && return 75
        pause=$((pause * 2 < most_pause ? pause * 2 : most_pause))
    done
}

# wait_for PID: its exit code, however often a signal interrupts the waiting.
wait_for() {
    local status
    while true; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2> /dev/null || return "$status"
    done
}
