"""No Triton kernel is compiled while requests wait: a step that compiles one could be taken for a stuck one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def test_the_warm_up_asks_for_every_variant() -> None:
    command = [sys.executable, "-m", "tests.executor.gpu_variants"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    fast, exact = json.loads(done.stdout)
    kernels = {
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
        "_levels",
        "_log_sum_exp",
        "_merge_splits",
        "_penalise",
        "_rms_norm",
        "_rotary_append",
        "_silu_and_mul",
        "_thresholds",
    }
    assert set(fast["warmed"]) == kernels
    assert set(exact["warmed"]) == kernels | {"_linear"}
    assert not any(fast["later"].values()), fast
    assert not any(exact["later"].values()), exact
