"""Every Triton kernel compiles for a GPU: no GPU is needed for that, only an interpreter that is switched off."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
HOPPER_SHARED_MEMORY = 227 << 10  # bytes that one program may have


def test_every_kernel_compiles_for_hopper() -> None:
    command = [sys.executable, "-m", "tests.kernels.gpu_compilation"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert set(made) == {
        "_add_bias",
        "_attend",
        "_attend_split",
        "_choose",
        "_count",
        "_distribution",
        "_draw",
        "_extremes",
        "_forbid",
        "_gather",
        "_kv_append",
        "_levels",
        "_linear",
        "_log_sum_exp",
        "_merge_splits",
        "_norm_rotary",
        "_penalise",
        "_rms_norm",
        "_rotary_append",
        "_silu_and_mul",
        "_thresholds",
    }
    kernels = [kernel for variants in made.values() for kernel in variants]
    assert all(kernel["shared"] <= HOPPER_SHARED_MEMORY for kernel in kernels)
    assert {kernel["matrix_unit"] for kernel in made["_linear"]} == {"wgmma"}
    assert {kernel["matrix_unit"] for kernel in made["_attend"]} == {"mma.sync", "wgmma"}
