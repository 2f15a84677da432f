"""Where the news and logs of a local cluster go."""

import sys
import threading
from pathlib import Path
from typing import Protocol, TextIO


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
        print(line, file=sys.stderr, flush=True)

    def log(self, process: str, line: str) -> None:
        print(f"[{process}] {line}", file=sys.stderr, flush=True)


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
