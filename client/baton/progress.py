"""Progress bars: on stderr, and by default only if that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from baton.batch import Outcome
from baton.values import Completion

_REFRESH_PER_SECOND = 4  # drawing must not cost what the model needs


@contextmanager
def batch_progress(total: int, shown: bool | None = None) -> Iterator[Callable[[Outcome], None]]:
    """Like ``request_progress``; gives what to call with each outcome."""
    with request_progress(total, shown) as advance:
        yield lambda outcome: advance(outcome.usage.completion_tokens if isinstance(outcome, Completion) else 0)


@contextmanager
def request_progress(total: int | None, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Shows how many requests have ended, and tokens per second; gives what to call with the tokens of each.

    Args:
        total: how many there will be; None = nobody knows.
        shown: None = if stderr is a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda _: None
        return
    # Only now: whoever shows no bar does not wait for this import.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests,"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=Console(stderr=True),
        refresh_per_second=_REFRESH_PER_SECOND,
        redirect_stdout=sys.stdout.isatty(),  # rich would send a pipe's content to stderr
    ) as bar:
        task = bar.add_task("", total=total, speed="- tokens/s")
        tokens = 0

        def advance(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            elapsed = bar.tasks[task].elapsed or 0.0
            bar.update(task, advance=1, speed=f"{tokens / elapsed:.0f} tokens/s" if elapsed else "- tokens/s")

        yield advance


@contextmanager
def byte_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of ``total`` bytes are written, if stderr is a terminal; gives what to call with each count."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
