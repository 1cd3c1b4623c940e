#!/usr/bin/env bash
# Runs tests/gpu on a machine with a CUDA device: correctness against transformers, CPU and GPU, in every way the engine can run.
#
#   scripts/gpu_tests.sh [arguments of pytest]      e.g. scripts/gpu_tests.sh -k isolation, or tests/gpu/test_kernels.py
#
# The machine's own torch, triton and transformers are used where its python3 has torch with CUDA (PYTHON=... names another
# Python); what mmv1 needs beside them is put into a folder of its own, build/gpu-site, and nothing of the machine is changed.
# Without such a torch everything of requirements.lock is installed into .venv.
#
#   MMV1_WHEELS=DIR        install from the wheels in this folder only: for machines that reach no package index
#   MMV1_GPU_MODELS=DIR    where random models of real shapes are made and kept; default build/gpu-models (30 GB)
#   MMV1_GPU_RESULTS=FILE  figures, as JSON; default build/gpu-results.json; pytest's own report is put beside it (.xml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SITE=$PWD/build/gpu-site
export MMV1_GPU_MODELS=${MMV1_GPU_MODELS:-$PWD/build/gpu-models}
export MMV1_GPU_RESULTS=${MMV1_GPU_RESULTS:-$PWD/build/gpu-results.json}
python=${PYTHON:-python3}

say() { echo "gpu_tests: $*"; }
sees_cuda() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

# What mmv1 and its tests require and this Python does not have, one a line, at the locked version.
missing() {
    PYTHONPATH="$SITE" "$python" - <<'END'
import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

KEPT = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")  # the machine's own, whatever their version
locked = dict(re.findall(r"^([\w.-]+)==(\S+)", open("requirements.lock").read(), re.M))
declared = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
wanted = [(Requirement(text), "") for text in [*declared, "pytest", "pytest-timeout", "hypothesis"]]
seen = set()
while wanted:
    requirement, extra = wanted.pop()
    name = requirement.name.lower().replace("_", "-")
    if (requirement.marker and not requirement.marker.evaluate({"extra": extra})) or KEPT.fullmatch(name):
        continue
    new = {(name, wished) for wished in ("", *requirement.extras)} - seen
    seen |= new
    try:
        there = distribution(name)
    except PackageNotFoundError:
        there = None
    if there is None or not requirement.specifier.contains(there.version, prereleases=True):
        print(f"{name}=={locked[name]}" if name in locked else str(requirement))
    else:
        wanted += [(Requirement(text), wished) for _, wished in new for text in there.requires or ()]
END
}

install_beside_torch() {
    local quiet=(--quiet --disable-pip-version-check --no-input --root-user-action ignore --no-compile --target "$SITE")
    if [ -n "${MMV1_WHEELS:-}" ]; then
        "$python" -m pip install "${quiet[@]}" --no-index --no-deps --upgrade "$MMV1_WHEELS"/*.whl
        return
    fi
    # What is missing may itself lack something, which shows once it is there.
    local round packages
    for round in 1 2 3 4 5; do
        mapfile -t packages < <(missing | sort -u)
        [ ${#packages[@]} -gt 0 ] || break
        "$python" -m pip install "${quiet[@]}" --no-deps "${packages[@]}"
    done
    install_flash "${quiet[@]}" || say "the extra 'flash' cannot be installed: mmv1's own attention kernels are tested alone"
}

# flash-attn-4 and what it needs but torch, which is there.
install_flash() {
    "$python" -c 'import flash_attn.cute' 2>/dev/null && return
    PYTHONPATH="$SITE:$SITE/nvidia_cutlass_dsl/dsl_packages" "$python" -c 'import flash_attn.cute' 2>/dev/null && return
    "$python" -m pip install "$@" --pre --no-deps flash-attn-4 quack-kernels nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base \
        nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13 'apache-tvm-ffi>=0.1.11,<0.2' torch-c-dlpack-ext
}

if sees_cuda "$python"; then
    stamp="$("$python" -c 'import sys, torch; print(sys.version, torch.__version__)') ${MMV1_WHEELS:-} $(sha256sum <requirements.lock)"
    if [ "$(cat "$SITE/.made-from" 2>/dev/null)" != "$stamp" ]; then
        rm -rf "$SITE" && mkdir -p "$SITE"
        say "installing what mmv1 needs beside torch into build/gpu-site"
        install_beside_torch
        echo "$stamp" >"$SITE/.made-from"
    fi
    export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}:$SITE/nvidia_cutlass_dsl/dsl_packages"
else
    say "$python has no torch that sees a CUDA device: using .venv"
    bash scripts/setup.sh
    python=.venv/bin/python
    if ! sees_cuda "$python"; then
        say "no CUDA device: these tests would all be skipped"
        exit 1
    fi
    uv=$(command -v uv || echo .tools/uv/bin/uv)
    "$uv" pip install --quiet --python "$python" --editable '.[flash]' || say "the extra 'flash' cannot be installed"
fi

tests=(tests/gpu)
for argument; do
    case $argument in tests/*) tests=() ;; esac # which ones is said already
done
report=${MMV1_GPU_RESULTS%.json}.xml
mkdir -p "$(dirname "$report")"
status=0
"$python" -m pytest ${tests[@]+"${tests[@]}"} -p no:cacheprovider --junitxml "$report" "$@" || status=$?

"$python" - "$MMV1_GPU_RESULTS" "$report" <<'END'
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

results, report = map(Path, sys.argv[1:])
figures = json.loads(results.read_text()) if results.exists() else {}
totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "time": 0.0}
if report.exists():
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        totals = {name: value + type(value)(float(suite.get(name, 0))) for name, value in totals.items()}
figures["tests"] = totals
results.write_text(json.dumps(figures, indent=1) + "\n")
print("----", results)
for name, values in figures.items():
    print(f"{name}: " + "; ".join(f"{key} {value}" for key, value in values.items()))
END
exit $status
