"""Lets waiting requests onto an executor's rows."""

from scheduler_service.core.inflight import MAX_RUN_AHEAD, InflightLedger
from scheduler_service.core.kv_cache_manager import KVCacheManager
from scheduler_service.core.request import Request, RequestStatus
from scheduler_service.core.running import RunningRows
from scheduler_service.core.step_builder import StepBuilder, TokenBudget
from scheduler_service.core.step_plan import NO_TOKENS, Admission
from scheduler_service.core.waiting_queue import Backlog


class Admissions:
    """Takes requests from the backlog, in order, as far as rows, blocks and the step's budget go."""

    def __init__(
        self,
        backlog: Backlog,
        running: RunningRows,
        kv: KVCacheManager,
        ledger: InflightLedger,
        arithmetic: str | None,
    ) -> None:
        self._backlog = backlog
        self._running = running
        self._table = running.table
        self._kv = kv
        self._ledger = ledger
        self._arithmetic = arithmetic
        self._inexact: list[Request] = []  # since the last result

    def admit(self, step: StepBuilder, budget: TokenBudget, now: float, before: int | None = None) -> None:
        """Admit waiting requests; with ``before``, those only that run earlier than this priority."""
        waiting = self._backlog.waiting
        postponed: list[Request] = []
        while budget.tokens > 0 and self._table.has_free_row and (request := waiting.peek()) is not None:
            if before is not None and request.priority >= before:
                break
            if self._is_in_flight(request):
                break
            most = budget.available(replays=_replays(request))
            matched = self._kv.match(request) if most > 0 else []
            if matched is None:
                postponed.append(waiting.pop())
                continue
            if most <= 0 or not self._kv.can_admit(request, matched, self.reserve()):
                break
            waiting.pop()
            row = self._admit(step, request, matched, now)
            self.continue_row(step, row, budget)
        for request in postponed:
            waiting.push(request)

    def continue_row(self, step: StepBuilder, row: int, budget: TokenBudget) -> None:
        """Compute a row's next known tokens, as many as the budget allows."""
        replays = _replays(self._table.request(row))
        most = budget.available(replays=replays)
        if most <= 0:
            return
        budget.spend(step.chunk(row, most), replays=replays)
        self._kv.publish_dispatched(self._table.request(row), row)
        if self._table.num_dispatched[row] == self._table.num_explicit[row]:
            self._running.prefilled(row)

    def rows_to_preempt(self) -> list[int]:
        """Rows that make room for the next waiting request: none if it has room, or if all of them would not do."""
        request = self._backlog.waiting.peek()
        if request is None or self._is_in_flight(request):
            return []
        victims = self._running.victims_for(request)
        if not victims:
            return []
        matched = self._kv.match(request)
        if matched is None:
            return []
        count = self._kv.num_victims_needed(request, matched, victims, self.reserve)
        if count is None:
            return []
        return victims[: count if self._table.has_free_row else max(1, count)]

    def admit_alone(self, step: StepBuilder, request: Request, now: float) -> int | None:
        """Admit a suspect, which is next in its queue; its row, or None if somebody has to make room first."""
        matched = self._kv.match(request)
        if matched is None or not self._table.has_free_row or not self._kv.can_admit(request, matched, 0):
            return None
        self._backlog.discard(request)
        return self._admit(step, request, matched, now)

    def take_inexact(self) -> list[int]:
        """Handles of streams that go on here since the last call, and whose next tokens may be rounded otherwise."""
        inexact, self._inexact = self._inexact, []
        for request in inexact:
            request.arithmetic = self._arithmetic
        return [request.handle for request in inexact if request.status is not RequestStatus.FINISHED]

    def reserve(self, num_leaving: int = 0) -> int:
        """Blocks an admission leaves allocatable, so that run-ahead alone never makes running rows preempt."""
        running = self._table.num_running - num_leaving
        return self._kv.num_blocks_for(MAX_RUN_AHEAD * (running + 1)) if running else 0

    def _is_in_flight(self, request: Request) -> bool:
        """Whether tokens of its former admission are still to come."""
        return request.last_step > self._ledger.settled_step

    def _admit(self, step: StepBuilder, request: Request, matched: list[int], now: float) -> int:
        row = self._running.admit(request, matched, now)
        if len(request.token_ids) == request.num_given_tokens:
            request.arithmetic = self._arithmetic
        goes_on = len(request.token_ids) > request.num_prompt_tokens
        if goes_on and (self._arithmetic is None or request.arithmetic != self._arithmetic):
            self._inexact.append(request)
        audit_from = request.audit_from
        if int(self._table.num_dispatched[row]) >= len(request.token_ids) - 1:
            audit_from = 0  # all logits that precede a known token were computed before, and their KV is in the cache
        needs_log = request.sampling.needs_log or audit_from > 0
        step.admissions.append(
            Admission(
                row=row,
                block_ids=self._table.blocks(row).copy(),
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling,
                token_ids=request.token_ids if needs_log else NO_TOKENS,
                audit_from=audit_from,
            )
        )
        return row


def _replays(request: Request) -> bool:
    """Whether its row computes output anew that it had before."""
    return len(request.token_ids) > request.num_prompt_tokens
