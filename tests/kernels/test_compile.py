"""What the interpreter runs, the compiler takes: no device is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY_BYTES = 227 << 10  # that a program may have on an H100
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("compile_for_hopper.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    compiled = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, _, _ in compiled} == {
        "_rms_norm_kernel", "_add_rms_norm_kernel", "_layer_norm_kernel", "_add_layer_norm_kernel", "_silu_and_mul_kernel",
        "_quick_gelu_kernel", "_rotate_and_store_kernel", "_rotate_kernel", "_embed_kernel", "_add_interpolated_kernel",
        "_normalize_patches_kernel", "_skinny_kernel", "_sum_parts_kernel", "_draw_parts_kernel", "_choose_part_kernel",
        "_route_kernel", "_count_kernel", "_sort_kernel", "_gate_up_kernel", "_down_kernel", "_sum_kernel",
        "_attention_kernel", "_combine_kernel", "_window_kernel", "_segment_kernel",
    }  # fmt: skip
    for name, shared, local in compiled:
        assert int(shared) <= SHARED_MEMORY_BYTES and int(local) == 0, (name, shared, local)
