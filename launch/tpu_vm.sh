#!/usr/bin/env bash
# Trains on Cloud TPU VMs, v4 to v6e, through a queued resource:
#     bash launch/tpu_vm.sh create     asks for the slices; wait: until they are there; train: installs and starts;
#                                      logs: of the first host; delete: gives them back
#     bash launch/tpu_vm.sh all        create, wait and train
# --dry-run before the verb prints the exact commands and runs none. Settings: launch/launch.env.
#
# What to expect: `wait` ends with "state: ACTIVE"; `train` prints from one host
#     /shared/runs/NAME: 162,... parameters (hidden 768, blocks 12), aligned, tiled layout; ...
# and then a line per training.log_every steps: step, loss, tokens/s, mfu.
# After a preemption: delete, then the same commands; training goes on from the newest checkpoint.
#
# Pages the flags come from, read 2026-11-21 (compiled and tested against stubs, not run on a TPU by us):
#   docs.cloud.google.com/tpu/docs/queued-resources    states, --spot, several slices with --node-count
#   cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create    --node-id | --node-count --node-prefix
#   cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh    --worker=all --command
#   docs.cloud.google.com/tpu/docs/runtimes    runtime versions (v4's and v6e's not looked up anew)
#   tpu7x is not offered as a TPU VM (first page): use xpk.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="usage: tpu_vm.sh [--dry-run] create | wait | train | logs | delete | all"
if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
[[ $# == 1 ]] || die "$usage"

needs PROJECT ZONE NAME
read_topology
[[ $generation != tpu7x ]] || die "TOPOLOGY: got '$TOPOLOGY'; tpu7x runs on GKE only: bash launch/xpk.sh"
installed gcloud "see cloud.google.com/sdk/docs/install"
declare -A runtimes=([v4]=tpu-ubuntu2204-base [v5e]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e)
place=(--project="$PROJECT" --zone="$ZONE")

nodes() {
    local i
    if ((SLICES == 1)); then
        echo "$NAME"
    else
        for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
    fi
}

create() {
    local which=(--node-id="$NAME") more=()
    ((SLICES == 1)) || which=(--node-count="$SLICES" --node-prefix="$NAME")
    [[ $SPOT != yes ]] || more=(--spot)
    run gcloud compute tpus queued-resources create "$NAME" "${place[@]}" "${which[@]}" \
        --accelerator-type="$(accelerator_type)" --runtime-version="${runtimes[$generation]}" "${more[@]}"
}

wait_for() {
    local state
    while true; do
        run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'
        [[ $dry_run == no ]] || return 0
        state=$(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)')
        printf 'state: %s\n' "$state"
        case $state in
        ACTIVE) return 0 ;;
        FAILED | SUSPENDED | SUSPENDING) die "the queued resource $NAME is $state: bash launch/tpu_vm.sh delete, and again" ;;
        esac
        sleep "${WAIT_SECONDS:-30}"
    done
}

# Sends this checkout to every host, installs it, and starts training there in the background.
train() {
    local node archive flags
    needs CONFIG WORKDIR
    archive=${TMPDIR:-/tmp}/$NAME-checkout.tar.gz
    flags=$(compiler_flags "$generation")
    run git -C "$launch_folder/.." archive --format=tar.gz --output="$archive" HEAD
    for node in $(nodes); do
        run gcloud compute tpus tpu-vm scp "$archive" "$node:checkout.tar.gz" "${place[@]}" --worker=all
        run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$(
            printf '%s && ' "mkdir -p hdlm_jax" "tar -xzf checkout.tar.gz -C hdlm_jax" "cd hdlm_jax" \
                "python3 -m venv .venv" ". .venv/bin/activate" "pip install --quiet -e '.[tpu,gcs]'"
            printf "LIBTPU_INIT_ARGS='%s' nohup %s > ~/train.log 2>&1 < /dev/null &" "$flags" "$(train_command)"
        )"
    done
}

logs() { run gcloud compute tpus tpu-vm ssh "$(nodes | head -1)" "${place[@]}" --worker=0 --command="tail -n 50 -f train.log"; }

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet; }

case $1 in
create) create ;;
wait) wait_for ;;
train) train ;;
logs) logs ;;
delete) delete ;;
all)
    needs CONFIG WORKDIR
    create
    wait_for
    train
    ;;
*) die "$usage" ;;
esac
