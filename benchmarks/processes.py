"""Child processes of a benchmark: they say a line when they are ready, and none outlives it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

_GRACE_SECONDS = 5.0


class ProcessFailedError(Exception):
    """A child process ended or did not say in time what it should."""


class Child:
    """A process whose stdout is read line by line; its stderr goes where ours goes."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        stdin: bool = False,
        log: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            name: for messages.
            command: program and arguments.
            environment: variables besides ours.
            stdin: whether ``say`` will be used.
            log: where its stderr is appended, instead.
        """
        self.name = name
        self._unread = b""
        with contextlib.ExitStack() as stack:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=None if log is None else stack.enter_context(log.open("ab")),
                bufsize=0,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is ours to answer
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, line: str) -> None:
        """Write a line to its stdin.

        Raises:
            ProcessFailedError: it has ended.
        """
        assert self.process.stdin is not None
        try:
            _write_all(self.process.stdin, line.encode() + b"\n")
        except BrokenPipeError:
            raise ProcessFailedError(self._end()) from None

    def line(self, timeout: float) -> str:
        """Its next line.

        Raises:
            ProcessFailedError: it ended, or said nothing for ``timeout`` seconds.
        """
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ProcessFailedError(f"{self.name} did not answer within {timeout:g} s")
            if select.select([self.process.stdout], [], [], left)[0]:
                read = self.process.stdout.read(1 << 16)
                if not read:
                    raise ProcessFailedError(self._end())
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def json(self, timeout: float) -> dict[str, Any]:
        """Its next line, which is a JSON object; raises as ``line`` does."""
        value: dict[str, Any] = json.loads(self.line(timeout))
        return value

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to the whole session when that does not help."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole session if it has not ended; works on stopped processes too. Closes the pipes."""
        if self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _end(self) -> str:
        try:
            return f"{self.name} ended with exit code {self.process.wait(_GRACE_SECONDS)}"
        except subprocess.TimeoutExpired:
            return f"{self.name} has closed its stdout"


def python_module(module: str, *arguments: object) -> list[str]:
    """The command that runs one of our modules."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def _write_all(pipe: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]
