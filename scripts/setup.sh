#!/usr/bin/env bash
# Makes .venv: the packages of requirements.lock, hashes checked, and this project in editable form.
# Needs a Python of at least 3.11 (PYTHON=... chooses one). With nothing changed since the last run it ends at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_VERSION=0.13.9
STAMP=.venv/.made-from

fail() { echo "setup: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            command -v "$candidate"
            return
        fi
    done
    fail "mmv1 needs Python 3.11 or newer, and ${PYTHON:-python3} is missing or older: install one, or name it with PYTHON=..."
}

# Debian ships python3 without pip and without what venv needs to make one.
install_venv_package() {
    local as_root=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || return 1
        as_root=(sudo)
        [ -t 0 ] || as_root+=(-n)
    fi
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
}

# uv in .tools/uv, by whichever pip there is. Both ways leave the program at .tools/uv/bin/uv.
fetch_uv() {
    local python=$1 quiet=(--quiet --disable-pip-version-check --no-input)
    export PIP_ROOT_USER_ACTION=ignore
    echo "setup: fetching uv $UV_VERSION into .tools/"
    rm -rf .tools/uv
    if "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m pip install "${quiet[@]}" --target .tools/uv "uv==$UV_VERSION"
        return
    fi
    if ! "$python" -m venv .tools/uv >/dev/null 2>&1; then
        echo "setup: this Python has no pip; installing Debian's python3-venv"
        if ! { install_venv_package && "$python" -m venv --clear .tools/uv >/dev/null; }; then
            fail "$python has neither pip nor venv: install them (Debian: apt-get install python3-venv) and run this again"
        fi
    fi
    .tools/uv/bin/python -m pip install "${quiet[@]}" "uv==$UV_VERSION"
}

wanted="$PWD $(cat requirements.lock pyproject.toml scripts/setup.sh | sha256sum)"
if [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

python=$(find_python)
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    uv=.tools/uv/bin/uv
    [ "$("$uv" --version 2>/dev/null | cut -d' ' -f2)" = "$UV_VERSION" ] || fetch_uv "$python"
fi

rm -f "$STAMP"
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    "$uv" venv --quiet --clear --python "$python" .venv
fi
echo "setup: installing the locked packages into .venv (the first time this downloads about 3 GB)"
"$uv" pip sync --python .venv/bin/python --require-hashes requirements.lock
"$uv" pip install --python .venv/bin/python --quiet --no-deps --no-build-isolation --editable .
echo "$wanted" >"$STAMP"
echo "setup: done; $(.venv/bin/python --version) in .venv"
