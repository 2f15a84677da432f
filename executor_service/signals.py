"""Leaving on SIGTERM and SIGINT."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

_HARD_EXIT_SECONDS = 0.7
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """What SIGTERM and SIGINT do: they end the process within a second, with exit code 0.

    Once there is work to hand over, the first signal asks for that instead, and the process ends when that is done or
    its grace is over; a second signal ends it at once. The handler raises SystemExit in the main thread, which takes
    effect between two byte codes; while the main thread is deep in a library call, a thread ends the process.
    """

    def __init__(self) -> None:
        """Take the signals over; in the main thread."""
        self._drain: Callable[[], None] | None = None
        self._grace = 0.0
        self._has_drained = False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def drain_first(self, drain: Callable[[], None], grace: float) -> None:
        """From now on call ``drain``, from another thread, on the first signal, and give it ``grace`` seconds."""
        self._grace = grace
        self._drain = drain

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._drain is not None and not self._has_drained:
            self._has_drained = True
            return
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(0)

    def _watch(self, reader: int) -> None:
        _wait_for_signal(reader, None)
        if self._drain is not None:
            self._drain()
            if not _wait_for_signal(reader, self._grace):
                os._exit(0)
        time.sleep(_HARD_EXIT_SECONDS)
        os._exit(0)


def _wait_for_signal(reader: int, timeout: float | None) -> bool:
    """Wait until one of the signals arrives on the wake-up pipe; False if none does within ``timeout`` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            return False
        if os.read(reader, 1)[0] in _SIGNALS:
            return True
