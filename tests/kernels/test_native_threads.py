"""The pool of threads that kernels share."""

import os
import shutil
import subprocess
import sys
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


LOOPS = """
import os, torch
from pathlib import Path
from kernels.linear import linear, pack
def cores(task):
    status = (task / "status").read_text()
    return int(status.split("Cpus_allowed:")[1].split()[0].replace(",", ""), 16).bit_count()
torch.set_num_threads(1)
weight, x = pack(torch.randn(512, 64).bfloat16()), torch.randn(64, 64).bfloat16()
torch.set_num_threads(2)
before = set(Path("/proc/self/task").iterdir())
linear(x, weight, None, None)
(worker,) = set(Path("/proc/self/task").iterdir()) - before
print(cores(worker))
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
for _ in range(100):
    linear(x, weight, None, None)
print(cores(worker))
"""


@pytest.mark.skipif(not library.available(), reason="no native kernels")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_threads_leave_the_core_of_the_one_that_waits_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", LOOPS], capture_output=True, text=True, check=True, timeout=120)
    others = len(os.sched_getaffinity(0)) - 1
    assert done.stdout.split() == [str(others), str(others)]  # no core is left but its own: they stay where they are
