"""A program on a terminal of its own: what it shows is read, what a person would type is sent."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

CTRL_C = "\x03"
CTRL_D = "\x04"
_SIZE = (40, 120)
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
# The first terminal that the leader of a session opens becomes the one that Ctrl-C interrupts it from.
_LAUNCHER = "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """Runs ``command`` until the ``with`` block is left."""

    def __init__(self, command: Sequence[str]) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, _SIZE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)
        self._shown = ""
        self._read_up_to = 0

    def press(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 30.0) -> str:
        """What was shown since the last call, up to and with the first match; without control sequences."""
        deadline = time.monotonic() + seconds
        while not (match := re.compile(pattern).search(self._text(), self._read_up_to)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self._text()[self._read_up_to :]!r}"
            self._read()
        begun, self._read_up_to = self._read_up_to, match.end()
        return self._text()[begun : match.end()]

    def finish(self, seconds: float = 10.0) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def _text(self) -> str:
        return _CONTROL.sub("", self._shown)

    def _read(self) -> None:
        if select.select([self._master], [], [], 0.1)[0]:
            try:
                self._shown += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the program has ended
                time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
