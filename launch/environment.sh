# shellcheck shell=bash
# Sourced by the scripts of this folder: `environment EXTRAS` makes the virtual environment, installs this
# checkout with the extras (such as "[dev]", or "") and puts the environment first on PATH.
# The environment is $VENV if set (made if missing), else the active one, else .venv of the checkout; $PYTHON, if
# set, is the interpreter to make it with. Needs nothing but Python 3.11 and pip.

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the interpreter to make an environment with.
find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if command -v "$name" >/dev/null && is_new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer found (tried ${PYTHON:+$PYTHON, }python3.11, python3.12, python3.13, python3, python)." \
        "Install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# Makes the environment $1 unless it is there.
make_environment() {
    local python
    [[ -x $1/bin/python ]] && return
    python=$(find_python)
    say "making the environment $1 with $("$python" --version) ($python)"
    "$python" -m venv --without-pip "$1"
}

# Gives the environment $1 its own pip. Debian's Python may lack ensurepip: then the system's pip brings it.
add_pip() {
    "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
    "$1/bin/python" -m ensurepip --default-pip >/dev/null 2>&1 && return
    "$(find_python)" -m pip --python "$1/bin/python" install --quiet pip ||
        fail "Python has neither ensurepip nor pip; install python3-venv or python3-pip and run this again"
}

# Prints a digest of all that decides what an installation with the extras $1 holds.
installation_digest() {
    { printf '%s\n' "$PWD" "$1" && cat setup.cfg requirements.txt pyproject.toml; } |
        python -c 'import hashlib, sys; print(sys.version, hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# Tells whether this checkout is what the environment imports when it stands elsewhere.
is_installed() {
    (cd / && python - "$OLDPWD") <<'EOF' 2>/dev/null
import pathlib, sys
from importlib.util import find_spec
sys.exit(not pathlib.Path(find_spec("hdlm_jax").origin).samefile(pathlib.Path(sys.argv[1], "hdlm_jax/__init__.py")))
EOF
}

environment() {
    local extras=$1 venv=${VENV:-${VIRTUAL_ENV:-.venv}} stamp digest
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
    make_environment "$venv"
    is_new_enough "$venv/bin/python" || fail "$venv holds $("$venv/bin/python" --version); 3.11 or newer is needed"
    add_pip "$venv"
    venv=$(cd "$venv" && pwd)
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" PIP_DISABLE_PIP_VERSION_CHECK=1
    unset PYTHONHOME
    stamp="$venv/hdlm_jax${extras}.installed"
    digest=$(installation_digest "$extras")
    if [[ -f $stamp && $(<"$stamp") == "$digest" ]] && is_installed; then
        say "using the environment $venv (nothing to install)"
        return
    fi
    say "installing hdlm_jax$extras into $venv (about 1 GB and some minutes the first time)"
    rm -f "$stamp"
    python -m pip install --quiet --editable ".$extras"
    printf '%s\n' "$digest" >"$stamp"
}
