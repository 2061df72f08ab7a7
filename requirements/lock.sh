#!/usr/bin/env bash
# Write the lock files: every package with its version, environment marker and hashes, and no address.
# Each smaller lock is held to the versions of the larger one. Needs uv; arguments go to it (--upgrade).
set -euo pipefail
cd "$(dirname "$0")/.."

compile() { # <python> <output> <arguments...>
    local python=$1 output=$2
    shift 2
    uv pip compile --quiet --universal --python-version "$python" --generate-hashes --no-header \
        --no-annotate --no-emit-index-url --no-emit-find-links --group build \
        --output-file "$output" "$@" pyproject.toml
}

compile 3.11 requirements/dev.txt --extra dev "$@"
compile 3.11 requirements/test.txt --extra test --constraint requirements/dev.txt "$@"
compile 3.11 requirements/demo.txt --extra examples --constraint requirements/test.txt "$@"
compile 3.12 requirements/test-jax011.txt --extra test --group jax011 "$@"

if grep -n '://' requirements/*.txt; then
    echo "error: a lock holds an address" >&2
    exit 1
fi
