"""Runs the lines of a file as a batch and writes what comes of them, in the lines' order."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from baton.batch import BatchRequest, Outcome, run_batch
from baton.cli.outcome import one_line
from baton.cli.request_lines import RequestLine
from baton.cli.results import completion_object
from baton.client import Client
from baton.errors import BatonError, ConnectFailedError
from baton.progress import batch_progress
from baton.values import Completion

Writer = Callable[[RequestLine, Outcome], None]


def read_content(path: Path) -> bytes:
    """A file's content, or that of stdin for ``-``, all of it before anything runs."""
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


@contextmanager
def output_file(path: Path | None) -> Iterator[TextIO]:
    """The file to write to; stdout for None and ``-``."""
    if path is None or str(path) == "-":
        yield sys.stdout
        return
    with path.open("w", encoding="utf-8") as file:
        yield file


def json_writer(file: TextIO) -> Writer:
    """Writes one JSON object to a line."""

    def write(line: RequestLine, outcome: Outcome) -> None:
        result = completion_object(outcome) if isinstance(outcome, Completion) else {"error": one_line(outcome)}
        print(json.dumps({"id": line.id, **result}, ensure_ascii=False), file=file, flush=True)

    return write


def text_writer(file: TextIO) -> Writer:
    """Writes continuations for people to read, each below its prompt, as head(1) does with files."""

    def write(line: RequestLine, outcome: Outcome) -> None:
        if isinstance(outcome, Completion):
            for sample in outcome.samples:
                end = "" if sample.text.endswith("\n") else "\n"
                print(f"==> {line.text} <==\n{sample.text}", file=file, end=end, flush=True)

    return write


def run_lines(
    client: Client,
    lines: Sequence[RequestLine],
    write: Writer,
    *,
    concurrency: int,
    timeout: float | None,
    progress: bool | None,
) -> None:
    """Runs what can be run, writes every outcome, and tells each failure on stderr with its line's number.

    Args:
        concurrency: most requests at a time.
        timeout: seconds for each request; None = no limit.
        progress: show a progress bar on stderr; None = if that is a terminal.

    Raises:
        BatonError: some lines failed, or the cluster went away.
    """
    results = _InOrder(lines, write)
    good = [(index, line.request) for index, line in enumerate(lines) if isinstance(line.request, BatchRequest)]
    with batch_progress(len(good), progress) as advance:
        for index, line in enumerate(lines):
            if isinstance(line.request, BatonError):
                results.add(index, line.request)

        def keep(number: int, outcome: Outcome) -> None:
            if isinstance(outcome, ConnectFailedError):
                raise outcome  # the cluster is gone; the remaining lines are not to blame
            advance(outcome)
            results.add(good[number][0], outcome)

        run_batch(client, [one for _, one in good], in_flight=concurrency, on_outcome=keep, timeout=timeout)
    if results.failed:
        raise BatonError(f"{results.failed} of {len(lines)} requests failed")


class _InOrder:
    """Holds outcomes back until those of all earlier lines are written."""

    def __init__(self, lines: Sequence[RequestLine], write: Writer) -> None:
        self._lines = lines
        self._write = write
        self._held: dict[int, Outcome] = {}
        self._next = 0
        self.failed = 0

    def add(self, index: int, outcome: Outcome) -> None:
        self._held[index] = outcome
        while self._next in self._held:
            line, outcome = self._lines[self._next], self._held.pop(self._next)
            if isinstance(outcome, BatonError):
                self.failed += 1
                print(f"line {line.number}: {one_line(outcome)}", file=sys.stderr, flush=True)
            self._write(line, outcome)
            self._next += 1
