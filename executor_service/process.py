"""The process itself: leaving on signals, dying with the parent."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

_GRACE_SECONDS = 0.7
_PR_SET_PDEATHSIG = 1


def leave_on_signals() -> None:
    """Make SIGTERM and SIGINT end the process within a second, with exit code 0.

    The handler raises SystemExit in the main thread. That takes effect between two byte codes; while the main thread
    is deep in a library call, a watchdog ends the process. An executor has nothing to save.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watchdog, args=(reader,), name="signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)


def _watchdog(reader: int) -> None:
    while os.read(reader, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
        pass
    time.sleep(_GRACE_SECONDS)
    os._exit(0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Linux only; elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(0)
