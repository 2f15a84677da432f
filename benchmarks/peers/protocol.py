"""How a driver and the benchmark talk: one JSON object per line, requests on stdin, answers on stdout.

    (start)     -> {"name": "system 1.0", "load_s": 3.2, ...}
    {"requests": [[[prompt ids], tokens to generate], ...]}
                -> {"wall_s": 1.5, "lengths": [tokens generated, ...]}

A driver that fails answers {"error": "why"} and ends.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Protocol

_PR_SET_PDEATHSIG = 1


class Driver(Protocol):
    """A system that is ready to run."""

    def info(self) -> dict[str, str]:
        """Its ``name`` with its version, and other versions that matter."""

    def run(self, requests: list[tuple[list[int], int]]) -> list[int]:
        """Run (prompt ids, tokens to generate) pairs together, greedy, past any end-of-sequence id; output lengths."""


def serve(make_driver: Callable[[], Driver]) -> None:
    """Make the driver, then answer until stdin ends."""
    _end_with_parent()
    # Systems print what they like: stdout is ours, theirs goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    began = time.perf_counter()
    try:
        driver = make_driver()
        answers.write(json.dumps({**driver.info(), "load_s": round(time.perf_counter() - began, 2)}) + "\n")
        for line in sys.stdin:
            requests = json.loads(line)["requests"]
            began = time.perf_counter()
            lengths = driver.run(requests)
            wall = time.perf_counter() - began
            answers.write(json.dumps({"wall_s": wall, "lengths": lengths}) + "\n")
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}) + "\n")
        answers.flush()
        os._exit(1)
    os._exit(0)  # systems have threads that do not end by themselves


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
