"""What has become of a process's inferences."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """How many there were, and how long they took in all."""

    count: int = 0
    nanoseconds: int = 0


@dataclass(slots=True)
class Statistics:
    """Counts since the process's start; ``last_ms`` is the end of the latest, in milliseconds of the Unix epoch."""

    succeeded: Tally = field(default_factory=Tally)
    failed: Tally = field(default_factory=Tally)
    last_ms: int = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around one inference; it has failed if it raises, be it that its caller has gone."""
        begun, tally = time.monotonic_ns(), self.failed
        try:
            yield
            tally = self.succeeded
        finally:
            tally.count += 1
            tally.nanoseconds += time.monotonic_ns() - begun
            self.last_ms = time.time_ns() // 1_000_000
