"""Figures and how they leave: one JSON line each, on stdout."""

import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

from baton import BatonError
from benchmarks.processes import ProcessFailedError

_INTERRUPTED = 130


def emit(**figure: object) -> None:
    """Print one figure; None values are left out."""
    print(json.dumps({name: value for name, value in figure.items() if value is not None}), flush=True)


def note(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def median(values: Iterable[float], digits: int = 3) -> float:
    """Their median, rounded."""
    return round(statistics.median(values), digits)


def percentile(values: Sequence[float], percent: float, digits: int = 3) -> float | None:
    """The smallest of the values that at least ``percent`` of them do not exceed; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], digits)


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark's ``main``: Ctrl-C and SIGTERM end it and all its processes without a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(_INTERRUPTED)
    except (ProcessFailedError, BatonError) as error:
        note(f"error: {error}")
        sys.exit(1)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
