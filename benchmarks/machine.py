"""The processor: how many cores are ours, who uses them. Linux; elsewhere nothing is known of others."""

import os
import sys
import time
from pathlib import Path

from benchmarks.environment import cpu_seconds

_TICKS = os.sysconf("SC_CLK_TCK")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def command_line(pid: int) -> list[str]:
    """A process's arguments."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def peak_rss_mb(*pids: int) -> float:
    """The most memory, MB, that each of these processes and of all below them had in RAM, summed up; Linux only."""
    return round(sum(_peak_rss_kib(pid) for root in pids for pid in _tree(root)) * 1024 / 1e6, 1)


def tree_seconds(pid: int) -> float:
    """CPU time that a process and all below it have used; Linux only."""
    return sum(map(_seconds, _tree(pid)))


class ForeignLoad:
    """How many cores everybody else has kept busy since this object was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy, self._own = _usage()

    def cores(self) -> float | None:
        """Cores that processes other than ours used on average."""
        if sys.platform != "linux":
            return None
        busy, own = _usage()
        elapsed = max(1e-3, time.monotonic() - self._began)
        return round(max(0.0, (busy - self._busy) - (own - self._own)) / elapsed, 2)


def _usage() -> tuple[float, float]:
    """CPU seconds of the whole machine, and of this process and all below it."""
    if sys.platform != "linux":
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS, tree_seconds(os.getpid())


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(one for child in children(pid) for one in _tree(child))]
    except OSError:  # it has just ended
        return [pid]


def _seconds(pid: int) -> float:
    try:
        return cpu_seconds(pid)
    except OSError:
        return 0.0


def _peak_rss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
