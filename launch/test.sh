#!/usr/bin/env bash
# The checks and the tests, on a machine with nothing but Python 3.11 and pip:
#     bash launch/test.sh [--all] [pytest arguments]
# makes the environment, installs, then runs ruff (lint and format), shellcheck and the tests not marked slow;
# --all adds the slow ones. Again: the environment is kept and installed anew only when the requirements changed.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment "[dev]"

say "lint and format (ruff)"
ruff check .
ruff format --check .

say "shell scripts (shellcheck)"
shellcheck --external-sources launch/*.sh .ci/run

say "tests (pytest)"
python -m pytest --numprocesses auto --dist worksteal "$@"
