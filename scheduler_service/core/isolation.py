"""Runs suspects one at a time, with nothing else in flight, and no more often than others run."""

from scheduler_service.core.inflight import InflightLedger
from scheduler_service.core.request import Request
from scheduler_service.core.running import RunningRows
from scheduler_service.core.waiting_queue import Backlog


class Isolation:
    """Decides whose turn it is. Between the shared steps and those of a suspect the pipeline runs empty: then an
    executor's death says who was on it.

    Attributes:
        request: the suspect that is running.
    """

    def __init__(self, backlog: Backlog, running: RunningRows, ledger: InflightLedger) -> None:
        self.request: Request | None = None
        self._backlog = backlog
        self._running = running
        self._ledger = ledger
        self._last_step = 0  # of the last suspect that has lost its row
        self._debt = 0  # steps that others were kept from

    def is_due(self) -> bool:
        """Whether a suspect runs or shall run now."""
        if self.request is not None:
            return True
        return bool(self._backlog.suspects) and self._backlog.suspects.peek() is not None and not self._others_first()

    def blocks_others(self) -> bool:
        """Whether a suspect that has lost its row, or has ended, still has steps in flight."""
        return self._last_step > self._ledger.settled_step

    def note_step(self) -> None:
        """A step was planned."""
        self._debt = self._debt + 1 if self.request is not None else max(0, self._debt - 1)

    def note_settled(self) -> None:
        """Results have come: the suspect may have ended, or made enough progress to run with the others again."""
        request = self.request
        if request is None or request.deaths is None:
            return
        if request.row >= 0:
            request.deaths.note_progress(int(self._running.table.num_tokens[request.row]))
        if request.row < 0:
            self._last_step = request.last_step
        if request.row < 0 or not request.is_quarantined:
            self.request = None

    def forgive_debt(self) -> None:
        """The others have nothing to run."""
        self._debt = 0

    def _others_first(self) -> bool:
        others_wait = bool(len(self._running.decoding) or self._running.prefilling or self._backlog.waiting.peek())
        return self._debt > 0 and others_wait
