#!/usr/bin/env bash
# Several processes on one machine, each with simulated devices of its CPU: the multi-host program without hosts.
#     WORKDIR=/tmp/run CONFIG=experiments/quickstart.py:smoke bash launch/local_processes.sh [--dry-run]
#
# What to expect: the first process prints what a single one would; the others stay silent. Logs of all are
# WORKDIR.process-I.log. The first process that fails ends all, with its status.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "$*" in
"") ;;
--dry-run) dry_run=yes ;;
*) die "usage: local_processes.sh [--dry-run]" ;;
esac
needs CONFIG WORKDIR
for name in PROCESSES DEVICES_PER_PROCESS PORT; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name: got '${!name}'; allowed: a positive integer"
done
export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"

pids=()
# shellcheck disable=SC2329  # the trap calls it
stop() { ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true; }
trap stop EXIT INT TERM
for ((i = 0; i < PROCESSES; i++)); do
    read -ra command <<<"$(train_command)"
    command+=(--coordinator "localhost:$PORT" --num-processes "$PROCESSES" --process-id "$i")
    show env JAX_PLATFORMS=cpu XLA_FLAGS="$XLA_FLAGS" "${command[@]}"
    [[ $dry_run == no ]] || continue
    "${command[@]}" >"$WORKDIR.process-$i.log" 2>&1 &
    pids+=("$!")
done
[[ $dry_run == no ]] || exit 0
status=0
for _ in "${pids[@]}"; do
    wait -n "${pids[@]}" || status=$?
    ((status == 0)) || break
done
cat "$WORKDIR.process-0.log"
exit "$status"
