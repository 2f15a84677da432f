"""Stops one thread of a process in the middle of a kernel, while its other threads go on: a step that hangs.

Linux only (ptrace). The thread that asks for it holds the other one; if it ends, that goes on.
"""

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks.processes import ProcessFailedError

_CONT, _DETACH, _SEIZE, _INTERRUPT = 7, 17, 0x4206, 0x4207
_WAIT_FOR_THREADS = 0x40000000  # __WALL
_EVENT_STOP = 128  # a stop that was asked for, not one before a signal is delivered
_FIND_SECONDS = 5.0
_POLL = 0.0007


class HangError(ProcessFailedError):
    """The process has ended, or does not get to where it is to be stopped."""


@contextlib.asynccontextmanager
async def hung(pid: int, library: Path) -> AsyncIterator[None]:
    """In here a process's main thread stands still inside ``library``, with whatever it holds there; then it goes on.

    Raises:
        HangError: it was not there within 5 seconds, has ended, or may not be traced.
    """
    _ptrace(_SEIZE, pid)
    try:
        await _stop_inside(pid, library)
        yield
    finally:
        with contextlib.suppress(HangError):  # it was killed meanwhile: then that is how it ends
            _ptrace(_DETACH, pid)


async def _stop_inside(pid: int, library: Path) -> None:
    deadline = time.monotonic() + _FIND_SECONDS
    while True:
        _ptrace(_INTERRUPT, pid)
        signal_number = _await_stop(pid)
        if not signal_number and _is_inside(pid, library):
            return
        if time.monotonic() > deadline:
            raise HangError(f"process {pid} was not seen in {library.name} within {_FIND_SECONDS:g} s")
        _ptrace(_CONT, pid, signal_number)
        await asyncio.sleep(_POLL)


def _await_stop(pid: int) -> int:
    """Wait until the thread stands still; the signal that it must get when it goes on, else 0."""
    _, status = os.waitpid(pid, _WAIT_FOR_THREADS)
    if not os.WIFSTOPPED(status):
        raise HangError(f"process {pid} has ended")
    return 0 if status >> 16 == _EVENT_STOP else os.WSTOPSIG(status)


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, pid, None, data):
        raise HangError(f"ptrace({request:#x}) of process {pid}: {os.strerror(ctypes.get_errno())}")


def _is_inside(pid: int, library: Path) -> bool:
    """Whether the stopped thread's program counter is in the library: proc_pid_syscall(5), proc_pid_maps(5)."""
    try:
        kind, *_, counter = Path(f"/proc/{pid}/syscall").read_text().split()
        mappings = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # it has ended
        return False
    if kind != "-1":  # it waits in a system call
        return False
    for mapping in mappings:
        if mapping.endswith(str(library)):
            begin, _, end = mapping.split(maxsplit=1)[0].partition("-")
            if int(begin, 16) <= int(counter, 16) < int(end, 16):
                return True
    return False
