"""A stage of ``benchmarks.gpu_check`` in a process of its own: one that hangs, dies or loses the device ends alone."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence

from benchmarks.gpu.records import Report, check, note

_GRACE_SECONDS = 5.0  # for processes that the stage has started


def run_stage(title: str, command: Sequence[str], limit: float, report: Report) -> None:
    """Run ``command``, which appends to the report's file, for ``limit`` seconds at most.

    A stage that ends in any other way than by itself is a failed check; what it had found stays.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        failure = "" if process.wait(limit) == 0 else f"ended with code {process.returncode}"
    except subprocess.TimeoutExpired:
        failure = f"not done after {limit:.0f} s"
    finally:
        _end(process)
    report.reload()
    if failure:
        report.add(check(title, False, error=failure))
    note(f"{title}: {time.monotonic() - began:.1f} s")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Nothing of the stage goes on."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_GRACE_SECONDS)
    except ProcessLookupError:
        return
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
