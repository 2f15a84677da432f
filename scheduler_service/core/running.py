"""The running requests of one executor by what they need next, and how they lose their rows."""

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.inflight import InflightLedger
from scheduler_service.core.kv_cache_manager import KVCacheManager
from scheduler_service.core.request import Request, RequestStatus
from scheduler_service.core.row_table import NO_ADMISSION, Rows, RowTable
from scheduler_service.core.stats import SchedulerStats

_NO_ROWS = np.zeros(0, np.intp)


class RunningRows:
    """Sorts the rows of a RowTable.

    Attributes:
        decoding: rows past their known tokens that have steps to come.
        prefilling: rows that still have known tokens to compute.
        held: rows that are not scheduled for as long as their readers do not keep up.
        departed: by admission, requests that lost their row while steps of it were in flight, until they get another.
    """

    def __init__(self, table: RowTable, kv: KVCacheManager, ledger: InflightLedger, stats: SchedulerStats) -> None:
        self.table = table
        self.decoding: Rows = _NO_ROWS
        self.prefilling: list[int] = []
        self.held: set[int] = set()
        self.departed: dict[int, Request] = {}
        self._kv = kv
        self._ledger = ledger
        self._stats = stats
        self._released: list[int] = []  # since the last plan

    @property
    def any_about_to_end(self) -> bool:
        """Whether some rows have all their steps in flight: their blocks come back without preempting anybody."""
        return self.table.num_running > len(self.decoding) + len(self.prefilling) + len(self.held)

    def admit(self, request: Request, matched: list[int], now: float) -> int:
        """Give a waiting request a row, the ``matched`` cached blocks and fresh ones; the row."""
        table = self.table
        row = table.occupy(request)
        self._kv.admit(request, row, matched)
        cached = len(matched) * table.block_size
        table.num_dispatched[row] = cached
        table.num_settled[row] = cached
        self.prefilling.append(row)
        request.status = RequestStatus.RUNNING
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(cached, request.num_prompt_tokens)
            request.started_at = now
        self.forget_departed(request)
        self._stats.prefix_hit_tokens += cached
        self._stats.prefix_query_tokens += len(request.token_ids)
        return row

    def prefilled(self, row: int) -> None:
        """All known tokens of the row are dispatched."""
        self.prefilling.remove(row)
        if self.table.num_dispatched[row] < self.table.max_tokens[row] - 1:
            self.decoding = np.append(self.decoding, row)

    def drop_dispatched(self) -> None:
        """Forget the decoding rows that have all their steps in flight."""
        table, rows = self.table, self.decoding
        self.decoding = rows[table.num_dispatched[rows] < table.max_tokens[rows] - 1]

    def vacate(self, row: int, *, is_sound: bool = True) -> Request:
        """Take a row and its blocks from its request; then ``forget_vacant``.

        What it has generated may be shared; if it is not sound, not even what it has published.
        """
        if is_sound:
            self._kv.publish_settled(row)
        else:
            self._kv.unpublish(row)
        self._kv.release(row)
        self._released.append(row)
        return self.table.vacate(row)

    def forget_vacant(self) -> None:
        """Rows were vacated."""
        is_taken = self.table.admission != NO_ADMISSION
        self.decoding = self.decoding[is_taken[self.decoding]]
        self.prefilling = [row for row in self.prefilling if is_taken[row]]
        if self.held:
            self.held = {row for row in self.held if is_taken[row]}

    def preempt(self, row: int) -> Request:
        """Take a row from a request that goes on later; results in flight are still its own."""
        admission = int(self.table.admission[row])
        request = self.vacate(row)
        self.forget_vacant()
        request.status = RequestStatus.PREEMPTED
        if request.last_step > self._ledger.settled_step:
            self.departed[admission] = request
        return request

    def forget_departed(self, request: Request) -> None:
        """Nothing in flight is the request's any more, or it has ended."""
        if self.departed:
            self.departed = {admission: one for admission, one in self.departed.items() if one is not request}

    def holder(self, row: int, admission: int) -> Request | None:
        """Whose tokens the steps of an admission compute; None if that request has ended."""
        if self.table.admission[row] == admission:
            return self.table.requests[row]
        return self.departed.get(admission)

    def set_held(self, row: int, held: bool) -> None:
        """Take a row out of the steps to come, or put it back."""
        if held:
            self.decoding = self.decoding[self.decoding != row]
            self.prefilling = [one for one in self.prefilling if one != row]
            self.held.add(row)
            return
        self.held.discard(row)
        table = self.table
        if table.num_dispatched[row] < table.num_explicit[row]:
            self.prefilling.append(row)
        elif table.num_dispatched[row] < table.max_tokens[row] - 1:
            self.decoding = np.append(self.decoding, row)

    def victims(self) -> list[int]:
        """Rows in the order in which they lose their places: held ones, then the last by priority and arrival."""
        rows, held = self._candidates()
        order = np.lexsort((self.table.arrival[rows], self.table.priority[rows], held))
        victims: list[int] = rows[order[::-1]].tolist()
        return victims

    def victims_for(self, request: Request) -> list[int]:
        """Rows that have to make room for a waiting request, in order: held ones, and those of a later priority."""
        if not self.held and not (self.table.priority[self._candidates()[0]] > request.priority).any():
            return []
        priority = self.table.priority
        return [row for row in self.victims() if row in self.held or priority[row] > request.priority]

    def take_released(self) -> NDArray[np.int32]:
        """Rows vacated since the last plan."""
        released, self._released = self._released, []
        return np.array(released, np.int32)

    def _candidates(self) -> tuple[Rows, NDArray[np.bool_]]:
        """Rows that steps would have to be planned for, and which of them are held."""
        parts = [self.decoding, np.array(self.prefilling, np.intp), np.array(sorted(self.held), np.intp)]
        rows = np.concatenate(parts)
        held = np.zeros(len(rows), np.bool_)
        held[len(rows) - len(self.held) :] = True
        return rows, held
