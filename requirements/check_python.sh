#!/usr/bin/env bash
# Is this a Python that can run Weft? If not, say which one on this machine could.
set -u
python=$1

complain() {
    echo "error: $1" >&2
    pyenv=${PYENV_ROOT:-$HOME/.pyenv}/versions
    for other in "$pyenv/${python#python}".*/bin/python python3.13 python3.12 python3.11 python3 \
        "$pyenv"/3.1[1-9].*/bin/python; do
        if [ "$other" != "$python" ] && usable "$other"; then
            echo "       try: make PYTHON=$other ..." >&2
            exit 1
        fi
    done
    echo "       install Python 3.11 or later and pass it as make PYTHON=/path/to/python ..." >&2
    exit 1
}

# A pyenv shim may exist for a version that is not selected: running it is the only test.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

usable "$python" && exit 0
version=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) ||
    complain "'$python' does not run (PYTHON=$python)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    complain "Weft needs Python 3.11 or later; '$python' is $version"
complain "'$python' ($version) lacks venv or ensurepip (on Debian: apt install python3-venv)"
