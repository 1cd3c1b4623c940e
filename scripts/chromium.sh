#!/usr/bin/env bash
# Sees to it that there is a Chromium, in which the tests of the page at / click and type. Debian: installs the package. Elsewhere it
# says what is missing.
set -euo pipefail

command -v chromium >/dev/null && exit 0
missing() { echo "chromium is missing, and the tests of the page need it: install it (Debian: apt-get install chromium)" >&2; exit 1; }

command -v apt-get >/dev/null || missing
as_root=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || missing
    as_root=(sudo)
    [ -t 0 ] || as_root+=(-n)
fi
echo "setup: installing Debian's chromium for the tests"
"${as_root[@]}" apt-get update -qq || missing
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null || missing
