"""The pool of threads that kernels share."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.native import build, library


@pytest.mark.skipif(not library.available(), reason="no native kernels")
def test_each_task_of_a_loop_runs_once(tmp_path: Path) -> None:
    """Also when a thread that ends one loop meets the next one while that is being set up."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "pool"
    source = Path(__file__).with_name("pool_with_pauses.cpp")
    flags = ("-std=c++20", "-O1", "-pthread", f"-I{Path(build.__file__).parent}")
    subprocess.run([compiler, *flags, "-o", program, source], check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
