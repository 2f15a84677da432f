"""When requests arrive: moments in seconds after the start, ascending, without end."""

import itertools
from collections.abc import Iterator
from enum import StrEnum

import numpy as np


class Arrivals(StrEnum):
    """How requests at a given rate are spread in time."""

    POISSON = "poisson"  # independent callers: exponential gaps
    CONSTANT = "constant"  # a metronome


def arrival_times(arrivals: Arrivals, rate: float, random: np.random.Generator) -> Iterator[float]:
    """Arrivals at ``rate`` per second on average."""
    if arrivals is Arrivals.CONSTANT:
        return (number / rate for number in itertools.count())
    return itertools.accumulate(iter(lambda: float(random.exponential(1 / rate)), None))
