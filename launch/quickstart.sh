#!/usr/bin/env bash
# From clone to a trained model, on a machine with nothing but Python 3.11 and pip:
#     bash launch/quickstart.sh [--smoke]
# makes the environment, installs, trains on the interpreter's own documentation, evaluates, samples and draws.
# Everything it makes lies in runs/quickstart. Again: training goes on where it stopped, a finished one is kept.
# --smoke does the same in seconds with a tiny model, in runs/quickstart-smoke.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

config=experiments/quickstart.py
run=runs/quickstart
case "$*" in
"") ;;
--smoke) config=$config:smoke run=$run-smoke ;;
*) fail "unknown arguments: $*; allowed: --smoke" ;;
esac

environment ""

say "training $config into $run"
hdlm train --config "$config" --workdir "$run"

say "evaluating on the held-out split"
hdlm evaluate --run "$run"

say "sampling"
hdlm sample --run "$run" --num 4

say "drawing"
hdlm draw hyperschedule --config "$config" --out "$run/hyperschedule.png"
hdlm draw loss --run "$run" --out "$run/loss.png"

say "done: everything is in $run"
