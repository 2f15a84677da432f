"""Which request kills its executors: deaths are counted per request, and progress clears it.

A request that was in an unsettled step of an executor that died may be why, together with everybody else in those
steps. An executor that faulted has named the step: those of later steps had no part in it. Whoever sees a second death
without progress in between runs alone, which shows whose fault it is: the others make progress, and a third death is
nobody else's.

Progress is a settled token more than the request had in flight when the executor died: tokens are what they were the
first time, so by then everything that was under suspicion has been computed again, and survived. Asking for more would
take healthy requests for suspects where executors die often.
"""

from dataclasses import dataclass

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
        in_flight: its tokens that were in flight then.
    """

    total: int = 0
    streak: int = 0
    tokens: int = 0
    in_flight: int = 0

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
        if num_tokens - self.tokens > self.in_flight:
            self.streak = 0

    def note_death(self, num_tokens: int, in_flight: int) -> None:
        """Another executor died with the request in flight.

        Args:
            num_tokens: settled, in its log.
            in_flight: that steps in flight were to sample; 0 = they were to compute known ones only.
        """
        self.note_progress(num_tokens)
        self.total += 1
        self.streak += 1
        self.tokens = num_tokens
        self.in_flight = in_flight

    def describe(self) -> str:
        """Why the request fails, for its caller."""
        if self.streak >= _DEATHS_TO_FAIL:
            return f"its executor died {self.streak} times in a row while it ran, at last with nothing else running"
        return f"its executor died {self.total} times while it ran"
