#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs with xpk, v4 to tpu7x:
#     bash launch/xpk.sh submit        builds nothing: IMAGE is that of launch/Dockerfile, pushed before
#     bash launch/xpk.sh logs          follows the first pod;  list: the cluster's workloads;  delete: stops this one
# --dry-run before the verb prints the exact commands and runs none. Settings: launch/launch.env.
#
# What to expect: xpk ends with "Follow your workload here:" and a link; the first pod's log then holds
#     /shared/runs/NAME: 162,... parameters (hidden 768, blocks 12), aligned, tiled layout; ...
# A pod that dies is started again by the job set and resumes; give CONFIG and WORKDIR unchanged.
#
# Pages the flags come from (tested against stubs, not run on a cluster by us):
#   github.com/AI-Hypercomputer/xpk    workload create; an excerpt of its README, found 2026-11-21: check `xpk --version`
#   docs.cloud.google.com/tpu/docs/tpu7x-training    read 2026-11-21: tpu7x runs on GKE, new clusters by Cluster Toolkit
#   kubernetes.io/docs/reference/kubectl/generated/kubectl_logs    --selector, --follow; not looked up anew
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="usage: xpk.sh [--dry-run] submit | list | logs | delete"
if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
[[ $# == 1 ]] || die "$usage"

needs PROJECT ZONE CLUSTER NAME
read_topology
installed xpk "pip install xpk"
place=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

submit() {
    needs IMAGE CONFIG WORKDIR
    run xpk workload create "${place[@]}" --workload="$NAME" --tpu-type="$(accelerator_type)" --num-slices="$SLICES" \
        --docker-image="$IMAGE" \
        --command="export LIBTPU_INIT_ARGS='$(compiler_flags "$generation")' && $(train_command)"
}

logs() {
    installed kubectl "see kubernetes.io/docs/tasks/tools"
    run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" --follow
}

case $1 in
submit) submit ;;
list) run xpk workload list "${place[@]}" ;;
logs) logs ;;
delete) run xpk workload delete "${place[@]}" --workload="$NAME" --force ;;
*) die "$usage" ;;
esac
