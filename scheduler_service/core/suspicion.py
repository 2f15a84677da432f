"""Which request kills its executors: deaths are counted per request, and progress clears it.

A request that was in an unsettled step of an executor that died, or that faulted, may be why, together with everybody
else in those steps. Whoever sees a second death without progress in between runs alone, which shows whose fault it is:
the others make progress, and a third death is nobody else's.
"""

from dataclasses import dataclass

from scheduler_service.core.inflight import MAX_RUN_AHEAD

# Settled since the last death, these many tokens are more than an executor can have had in flight: it has survived
# whatever was under suspicion.
PROGRESS_TOKENS = MAX_RUN_AHEAD + 1
_DEATHS_TO_QUARANTINE = 2
_DEATHS_TO_FAIL = 3
_MAX_DEATHS = 16


@dataclass(slots=True)
class DeathRecord:
    """Executors that died with one request in flight.

    Attributes:
        total: all of them.
        streak: those without progress of the request between them.
        tokens: the length of its log at the last one.
    """

    total: int = 0
    streak: int = 0
    tokens: int = 0

    @property
    def is_quarantined(self) -> bool:
        """Whether the request must run alone."""
        return self.streak >= _DEATHS_TO_QUARANTINE

    @property
    def is_condemned(self) -> bool:
        """Whether the request must not run again."""
        return self.streak >= _DEATHS_TO_FAIL or self.total >= _MAX_DEATHS

    def note_progress(self, num_tokens: int) -> None:
        """The request's log has grown to ``num_tokens``."""
        if num_tokens - self.tokens >= PROGRESS_TOKENS:
            self.streak = 0

    def note_death(self, num_tokens: int) -> None:
        """Another executor died with the request in flight; its log has ``num_tokens`` settled tokens."""
        self.note_progress(num_tokens)
        self.total += 1
        self.streak += 1
        self.tokens = num_tokens

    def describe(self) -> str:
        """Why the request fails, for its caller."""
        if self.streak >= _DEATHS_TO_FAIL:
            return f"its executor died {self.streak} times in a row while it ran, at last with nothing else running"
        return f"its executor died {self.total} times while it ran"
