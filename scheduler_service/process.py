"""What every process of the scheduler does to itself at its start."""

import ctypes
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that a crashed launcher leaves nothing behind.

    Linux only; elsewhere it does nothing. The signal comes when the *thread* that started this process ends, so the
    launcher starts its children from its main thread.

    Raises:
        OSError: the kernel refused.
        SystemExit: the parent has just died.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:
        raise SystemExit("the parent process has ended")


def configure_logging(level: str) -> None:
    """One line per event on stderr."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
