"""How many KV blocks fit."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

_CPU_SHARE = 0.25
_CUDA_SHARE = 0.9
_CGROUP = Path("/sys/fs/cgroup")


def default_kv_bytes(device: torch.device, working_bytes: int = 0) -> int:
    """Bytes to give to the KV cache when nobody said how many: a share of what is free now and no step needs.

    working_bytes: what the largest step takes on a CUDA device (``peak_bytes``). Memory of other processes counts as
    what it is, not free; it is never taken for a part of what a step needs.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, int((free - working_bytes) * _CUDA_SHARE))
    return int(available_ram() * _CPU_SHARE)


def peak_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """What ``work`` takes of a CUDA device at most, beyond what is held before: this process's own tensors only."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def available_ram() -> int:
    """Bytes of RAM this process may still take: the machine's, or its control group's if that has less."""
    machine = _machine_room()
    return min(machine, _cgroup_room(machine))


def _machine_room() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _cgroup_room(machine: int) -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return machine
    return machine if limit == "max" else max(0, int(limit) - used)
