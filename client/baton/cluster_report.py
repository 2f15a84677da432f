"""Where the news and logs of a local cluster go."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.status import Status


class Reporter(Protocol):
    """Hears what a local cluster does, from several threads."""

    def progress(self, text: str) -> None:
        """What the start waits for; called many times a second."""

    def event(self, line: str) -> None:
        """Something happened that the user should know."""

    def log(self, process: str, line: str) -> None:
        """A process wrote a line to its log."""


class StderrReporter:
    """Passes events and logs on to stderr and keeps quiet about progress."""

    def progress(self, text: str) -> None:
        pass

    def event(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")  # in one piece: other threads write, too

    def log(self, process: str, line: str) -> None:
        sys.stderr.write(f"[{process}] {line}\n")


class TerminalReporter(StderrReporter):
    """A spinner while the cluster starts, if stderr is a terminal; elsewhere a line now and then.

    Args:
        quiet_seconds: between two such lines; None = never one.
    """

    def __init__(self, quiet_seconds: float | None) -> None:
        self._quiet_seconds = quiet_seconds
        self._spinner: Status | None = None
        self._began = self._last_line = time.monotonic()

    def progress(self, text: str) -> None:
        now = time.monotonic()
        text = f"{text} ({now - self._began:.0f} s)"
        if sys.stderr.isatty():
            self._spin(text)
        elif self._quiet_seconds is not None and now - self._last_line >= self._quiet_seconds:
            self._last_line = now
            self.event(text)

    def finish_progress(self) -> None:
        """Removes the spinner."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _spin(self, text: str) -> None:
        if self._spinner is None:
            from rich.console import Console  # only now: callers of remote clusters never need it

            # What others print to stderr or stdout meanwhile goes above the spinner.
            self._spinner = Console(stderr=True, highlight=False).status(text)
            self._spinner.start()
        self._spinner.update(text)


class ProcessLogs:
    """Sorts the processes' log lines into one file each, or hands them to the reporter.

    Args:
        directory: where the files go, ``<process>.log``, appended to; None = no files.
        reporter: gets the lines when there is no directory.
    """

    def __init__(self, directory: Path | None, reporter: Reporter) -> None:
        self._directory = directory
        self._reporter = reporter
        self._files: dict[str, TextIO] = {}
        self._lock = threading.Lock()

    def open(self) -> None:
        """Makes the directory; raises OSError when it cannot."""
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)

    def write(self, process: str, line: str) -> None:
        if self._directory is None:
            self._reporter.log(process, line)
            return
        with self._lock:
            if process not in self._files:
                self._files[process] = (self._directory / f"{process}.log").open("a", encoding="utf-8")
            print(line, file=self._files[process], flush=True)

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
