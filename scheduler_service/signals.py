"""Sleeping until a signal arrives, without looking up now and then."""

import os
import select
import signal
from types import TracebackType
from typing import Self


class Signals:
    """Within the ``with`` block, ``wait`` notices signals that Python handles, and the deaths of children.

    In the main thread; one at a time.
    """

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._sigchld = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, self._sigchld)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self, timeout: float | None) -> None:
        """Return once a signal has arrived, now or since the last time, and been handled; or after some seconds."""
        if select.select([self._reader], [], [], timeout)[0]:
            os.read(self._reader, 4096)
