# shellcheck shell=bash
# Sourced by the scripts that start training somewhere: reads launch.env, refuses placeholders, and runs commands or,
# with --dry-run, prints them.

launch_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/launch.env
source "$launch_folder/launch.env"
dry_run=no

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Prints a command so that it can be pasted into a shell.
show() {
    local word line=""
    for word in "$@"; do
        line+=" $(quoted "$word")"
    done
    printf '%s\n' "${line# }"
}

# A word as a shell reads it; plain words stay as they are.
quoted() {
    if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
        printf '%s' "$1"
    else
        printf "'%s'" "${1//\'/\'\\\'\'}"
    fi
}

# Runs a command after showing it, or only shows it.
run() {
    show "$@"
    [[ $dry_run == yes ]] || "$@"
}

# Refuses to go on while one of the named variables is empty or a placeholder.
needs() {
    local name
    for name in "$@"; do
        [[ -n ${!name} && ${!name} != *CHANGE_ME* ]] ||
            die "$name: got '${!name}'; set it in launch/launch.env or as $name=... before the command"
    done
}

# Refuses a command that is not installed, except where it is only shown.
installed() {
    [[ $dry_run == yes ]] || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# Splits TOPOLOGY into generation and chips.
read_topology() {
    [[ $TOPOLOGY =~ ^(v4|v5e|v5p|v6e|tpu7x):([0-9]+(x[0-9]+)+)$ ]] ||
        die "TOPOLOGY: got '$TOPOLOGY'; allowed: v4:, v5e:, v5p:, v6e: or tpu7x: and a shape, as v5e:4x4 or v5p:4x4x8"
    [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "SLICES: got '$SLICES'; allowed: a positive integer"
    generation=${TOPOLOGY%%:*}
    shape=${TOPOLOGY#*:}
    chips=$((${shape//x/*}))
}

# What Google Cloud calls the slice: by chips (v5e, v6e) or by cores, two per chip (v4, v5p).
accelerator_type() {
    case $generation in
    v4 | v5p) printf '%s-%d' "$generation" $((2 * chips)) ;;
    v5e) printf 'v5litepod-%d' "$chips" ;;
    v6e) printf 'v6e-%d' "$chips" ;;
    tpu7x) printf 'tpu7x-%s' "$shape" ;;
    esac
}

# The compiler's flags for a generation, from flags/.
compiler_flags() { grep -v '^#' "$launch_folder/flags/$1.txt" | tr '\n' ' ' | sed 's/ *$//'; }

# The training command. Several processes find each other, or say why not; the same command resumes.
train_command() {
    printf 'hdlm train --config %s --workdir %s --distributed on%s' "$CONFIG" "$WORKDIR" \
        "${TRAIN_ARGUMENTS:+ $TRAIN_ARGUMENTS}"
}
