"""What wakes a thread that sleeps."""

import contextlib
import os
import select
import weakref


class Bell:
    """Rung by any thread, or by a signal handler, where taking a lock could deadlock; one thread listens."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        # Not before nobody can ring any more, also when the program ends: they might be another file's by then.
        weakref.finalize(self, _close, self._reader, self._writer).atexit = False
        os.set_blocking(self._writer, False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)

    def ring(self) -> None:
        """Wake whoever waits, or, if nobody does, whoever waits next."""
        with contextlib.suppress(BlockingIOError):  # it has been rung thousands of times, and nobody listened
            os.write(self._writer, b"\0")

    def wait(self, seconds: float | None) -> None:
        """Return once it has rung since the last time, or after so long."""
        if self._poll.poll(None if seconds is None else seconds * 1e3):
            os.read(self._reader, 4096)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
