"""Stages of ``benchmarks.gpu_check`` in processes of their own: one that hangs, dies or loses the device ends alone."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.records import Report, check, note

_GRACE_SECONDS = 5.0  # for processes that the stage has started
_LEAST_SECONDS = 10.0  # a stage with less time is not begun; also what ending one may take
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class StageCommand:
    """A stage that appends what it finds to the report's file."""

    title: str
    command: Sequence[str]
    seconds: float  # at most


def run_stages(stages: Sequence[StageCommand], at_once: int, deadline: float, report: Report) -> None:
    """Run ``stages``, ``at_once`` of them side by side, until ``deadline`` of the monotonic clock at the latest.

    A stage that ends in any other way than by itself is a failed check; what it had found stays.
    """
    waiting = deque(stages)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                stage = waiting.popleft()
                limit = min(stage.seconds, deadline - _LEAST_SECONDS - time.monotonic())
                if limit < _LEAST_SECONDS and limit < stage.seconds:
                    report.add(check(stage.title, False, error="no time left"), stage.title)
                else:
                    running.append(_Running(stage, limit))
            for one in [one for one in running if one.is_over()]:
                running.remove(one)
                one.end(report)
            time.sleep(_POLL_SECONDS)
    finally:
        for one in running:
            one.end(report)


class _Running:
    """A stage's process, and all that it has started."""

    def __init__(self, stage: StageCommand, limit: float) -> None:
        self._title = stage.title
        self._limit = limit
        self._began = time.monotonic()
        self._process = subprocess.Popen(stage.command, stdin=subprocess.DEVNULL, start_new_session=True)

    def is_over(self) -> bool:
        """Whether it has ended, or must."""
        return self._process.poll() is not None or time.monotonic() - self._began > self._limit

    def end(self, report: Report) -> None:
        """Nothing of the stage goes on."""
        code = self._process.poll()
        seconds = time.monotonic() - self._began
        self._stop()
        if code is None:
            report.add(check(self._title, False, error=f"not done after {seconds:.1f} s"), self._title)
        elif code:
            report.add(check(self._title, False, error=f"ended with code {code}"), self._title)
        note(f"{self._title}: {seconds:.1f} s")

    def _stop(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(_GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()
