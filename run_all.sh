#!/usr/bin/env bash
# Runs the whole study: ./run_all.sh [options], ./run_all.sh --help, ./run_all.sh test [pytest options].
# Uses the active virtual or conda environment if this project is installed in it, else makes .venv with pip.
set -euo pipefail
TORCH=2.13.0  # the tested version
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"

die() { echo "run_all.sh: $*" >&2; exit 1; }
ours() {
    (cd / && "$1" -c 'import os, sys, qlutils
sys.exit(os.path.realpath(os.path.dirname(qlutils.__path__[0])) != sys.argv[1])' "$here") 2>/dev/null
}
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
if [ -n "$active" ] && [ "$active" != "$here/.venv" ] && ours "$active/bin/python"; then
    env="$active" managed=no
else
    env="$here/.venv" managed=yes
fi

if [ "$managed" = yes ] && ! recent "$env/bin/python"; then
    for base in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14 python; do
        recent "$base" && break || base=
    done
    [ -n "$base" ] || die "needs Python 3.11 or newer: sudo apt-get install python3 python3-venv (Debian," \
        "Ubuntu), or name one: PYTHON=/path/to/python3 ./run_all.sh"
    rm -rf "$env"
    if ! "$base" -m venv "$env" >/dev/null 2>&1; then
        rm -rf "$env"
        die "'$base -m venv' fails: sudo apt-get install python3-venv (Debian, Ubuntu); is $here writable?"
    fi
fi
python="$env/bin/python"

# install EXTRA: once for each content of pyproject.toml, so that the next start is immediate.
install() {
    local stamp="$env/.qlutils-installed$1" want; want="$TORCH $here $(cksum <"$here/pyproject.toml")"
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
    echo "run_all.sh: installing into $env (once; some minutes)" >&2
    # An unpinned torch may bring another CUDA build of several GB; this is the version the tests ran with.
    local pip=("$python" -m pip install -q --disable-pip-version-check)
    "${pip[@]}" "torch==$TORCH" -e "$here$1" ||
        die "the installation failed (see above); mend the cause and start again"
    echo "$want" >"$stamp"
}

if [ "${1:-}" = test ]; then
    shift
    install "[test]"
    cd "$here"
    # three workers for two cores: many tests wait for processes they start (a later -n overrides)
    exec "$python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
fi
[ "$managed" = no ] || install ""
# Whatever the locale: names of folders and models go into notebooks and records, which are UTF-8.
export PYTHONUTF8=1
exec "$python" -m qlutils.run "$@"
