#!/usr/bin/env bash
# Sees to it that there is a redis-server, which the tests of the shared store start for themselves. Debian and Ubuntu: installs the
# package, whose own service stays off. Elsewhere it says what is missing.
set -euo pipefail

command -v redis-server >/dev/null && exit 0
missing() { echo "redis-server is missing, and the tests of the shared store need it: install it (Debian: apt-get install redis-server)" >&2; exit 1; }

command -v apt-get >/dev/null || missing
as_root=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || missing
    as_root=(sudo)
    [ -t 0 ] || as_root+=(-n)
fi
echo "setup: installing Debian's redis-server for the tests"
"${as_root[@]}" apt-get update -qq || missing
# Only the program is wanted: a policy of 101 keeps the package from starting a service on the default port.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod +x "$policy"
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server >/dev/null || missing
