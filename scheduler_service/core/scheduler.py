"""Schedules one executor: turns waiting and running requests into step plans, and results into outputs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from scheduler_service.core.admission import Admissions
from scheduler_service.core.inflight import InflightLedger, RunAhead
from scheduler_service.core.isolation import Isolation
from scheduler_service.core.kv_cache_manager import KVCacheManager
from scheduler_service.core.outputs import Outputs
from scheduler_service.core.request import Request, RequestStatus
from scheduler_service.core.row_table import RowTable
from scheduler_service.core.running import RunningRows
from scheduler_service.core.settlement import Settlement
from scheduler_service.core.stats import SchedulerStats
from scheduler_service.core.step_builder import StepBuilder, TokenBudget
from scheduler_service.core.step_plan import StepPlan, StepResult
from scheduler_service.core.waiting_queue import Backlog

_NO_ROWS = np.zeros(0, np.intp)
_NO_BLOCKS = np.zeros(0, np.int32)
# While others decode, at most this share of a step recomputes output that had been computed before: after the loss of
# an executor its heirs keep their pace.
_REPLAY_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class ExecutorCapacity:
    """What an executor reports of itself. ``max_rows`` must not exceed ``max_batched_tokens``.

    Executors of one ``arithmetic`` continue each other's streams bit by bit; None = not even its own once preempted.
    """

    block_size: int
    num_blocks: int
    max_rows: int
    max_batched_tokens: int
    max_model_len: int
    vocab_size: int
    arithmetic: str | None = ""

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output that can ever run: the last token needs no KV."""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)


class Scheduler:
    """One executor's scheduling: ``schedule()`` plans the next step, ``settle()`` takes in a result.

    There are no phases: a request has tokens, and ``num_dispatched`` catches up with them. A row first computes the
    tokens known at its admission (``num_explicit``, in chunks), then one token per step, each of them sampled by the
    step before and known only to the executor.
    """

    def __init__(self, capacity: ExecutorCapacity, run_ahead: int | None = None) -> None:
        self.capacity = capacity
        self.rows = RowTable(capacity.max_rows, capacity.max_model_len, capacity.block_size)
        self.kv = KVCacheManager(capacity.num_blocks, self.rows)
        self.backlog = Backlog()
        self.ledger = InflightLedger()
        self.run_ahead = RunAhead(run_ahead)
        self.stats = SchedulerStats()
        self.running = RunningRows(self.rows, self.kv, self.ledger, self.stats)
        self.isolation = Isolation(self.backlog, self.running, self.ledger)
        self._admissions = Admissions(self.backlog, self.running, self.kv, self.ledger, capacity.arithmetic)
        self._settlement = Settlement(self.ledger, self.running, self.backlog, self.stats, capacity.vocab_size)
        self._idle = True

    # ---------------------------------------------------------------- requests

    @property
    def num_running(self) -> int:
        return self.rows.num_running

    @property
    def num_waiting(self) -> int:
        return len(self.backlog)

    def add_request(self, request: Request) -> None:
        """Queue a request that fits (``max_total_tokens`` within the capacity's)."""
        self.backlog.push(request)

    def abort(self, request: Request) -> None:
        """End a request at once; its row and blocks are free for the next plan, tokens in flight are dropped."""
        if request.row >= 0:
            self.running.vacate(request.row)
            self.running.forget_vacant()
        else:
            self.backlog.discard(request)
            self.running.forget_departed(request)
        request.status = RequestStatus.FINISHED
        self.isolation.note_settled()

    def set_held(self, request: Request, held: bool) -> None:
        """Stop planning steps for a request, or go on. Held rows are the first to be preempted."""
        if request.is_held == held:
            return
        if request.row >= 0 and request is self.isolation.request:
            self._preempt(request.row)  # nobody could run while it holds still
        if request.row >= 0:
            request.is_held = held
            self.running.set_held(request.row, held)
        else:
            self.backlog.discard(request)
            request.is_held = held
            self.backlog.push(request)

    def requests_in_flight(self) -> list[Request]:
        """Live requests that unsettled steps compute tokens of."""
        return [request for request, _ in self.tokens_in_flight()]

    def tokens_in_flight(self, through: int | None = None) -> list[tuple[Request, int]]:
        """Live requests that unsettled steps compute tokens of, and how many of them these steps sample.

        With ``through``: steps up to this one.
        """
        found: dict[int, tuple[Request, int]] = {}
        for step in self.ledger.steps():
            if through is not None and step.step_id > through:
                break
            for row, admission, samples in zip(
                step.rows.tolist(), step.admissions.tolist(), step.samples_of_rows().tolist(), strict=True
            ):
                request = self.running.holder(row, admission)
                if request is not None:
                    _, count = found.get(request.handle, (request, 0))
                    found[request.handle] = request, count + samples
        return list(found.values())

    def take_all(self) -> list[Request]:
        """The executor is gone: all its requests with their logs, ready to be queued elsewhere. Ends this scheduler."""
        requests = self.backlog.requests()
        requests += [self.rows.vacate(row) for row in range(self.rows.max_rows) if self.rows.requests[row]]
        for request in requests:
            request.status = RequestStatus.WAITING
            request.last_step = 0
        return requests

    def vacate_rows(self, may_leave: Callable[[Request], bool]) -> None:
        """Hand over the running requests that ``may_leave``."""
        self.hand_over([one for one in self.rows.requests if one is not None and may_leave(one)])

    def hand_over(self, requests: Iterable[Request]) -> None:
        """Take their rows from running requests: ``take_idle`` has them once nothing of them is in flight."""
        for request in requests:
            self.backlog.push(self.running.preempt(request.row))
            self.stats.handovers += 1
        self.isolation.note_settled()

    def take_idle(self, may_leave: Callable[[Request], bool]) -> list[Request]:
        """Requests without a row that ``may_leave`` and have nothing in flight, ready to be queued elsewhere."""
        settled = self.ledger.settled_step
        requests = [one for one in self.backlog.requests() if one.last_step <= settled and may_leave(one)]
        for request in requests:
            self.backlog.discard(request)
            self.running.forget_departed(request)
            request.status = RequestStatus.WAITING
            request.last_step = 0
        return requests

    # ---------------------------------------------------------------- schedule

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None: no credit left, or nothing to run."""
        if not self._has_credit():
            return None
        self.kv.cache.begin_plan()
        step = StepBuilder(self.ledger.next_step_id, self.rows)
        if not self.isolation.is_due():
            if not self.isolation.blocks_others():
                self._plan_shared(step, now)
            if step.is_empty and not self.ledger:
                self.isolation.forgive_debt()
        if step.is_empty and self.isolation.is_due():
            self._plan_alone(step, now)
        if step.is_empty:
            self._idle = True
            return None
        plan, inflight = step.build(self.running.take_released(), after_idle=self._idle)
        self.ledger.push(inflight)
        self.isolation.note_step()
        self._idle = False
        return plan

    def _has_credit(self) -> bool:
        in_flight = len(self.ledger)
        if in_flight >= self.run_ahead.depth:
            return False
        # Long prefill steps hide any latency: more than two of them would only delay new arrivals.
        return in_flight < 2 or self.ledger.num_tokens < 2 * self.capacity.max_batched_tokens

    def _plan_shared(self, step: StepBuilder, now: float) -> None:
        """Everybody's step: decodes, chunks begun before, then admissions; each by priority."""
        for row in self._admissions.rows_to_preempt():
            self._preempt(row)
        preemptions = self.stats.preemptions
        self._plan_decodes(step)
        may_admit = self.stats.preemptions == preemptions
        budget = self._budget(step)
        for row in self._prefills_in_order():
            if may_admit:
                self._admissions.admit(step, budget, now, before=int(self.rows.priority[row]))
            self._admissions.continue_row(step, row, budget)
        if may_admit:
            self._admissions.admit(step, budget, now)

    def _plan_alone(self, step: StepBuilder, now: float) -> None:
        """A step of the one suspect that runs; it begins when nothing else is in flight."""
        isolation = self.isolation
        if isolation.request is None:
            request = self.backlog.suspects.peek()
            if self.ledger or request is None:
                return
            while self._admissions.admit_alone(step, request, now) is None:
                self._preempt(self.running.victims()[0])
            isolation.request = request
        row = isolation.request.row
        self._plan_decodes(step, only=row)
        if row in self.running.prefilling:
            self._admissions.continue_row(step, row, self._budget(step))

    def _budget(self, step: StepBuilder) -> TokenBudget:
        most = self.capacity.max_batched_tokens
        replay = max(1, int(most * _REPLAY_SHARE)) if step.num_decodes else most
        return TokenBudget(most - step.num_decodes, replay)

    def _prefills_in_order(self) -> list[int]:
        rows, table = list(self.running.prefilling), self.rows
        return sorted(rows, key=lambda row: (int(table.priority[row]), int(table.arrival[row]))) if rows else rows

    def _plan_decodes(self, step: StepBuilder, only: int | None = None) -> None:
        """One token for every decoding row, or for one ``only``; rows are preempted while blocks lack."""
        table, pool, running = self.rows, self.kv.pool, self.running
        extend_rows, extend_blocks = _NO_ROWS, _NO_BLOCKS
        while True:
            rows = running.decoding if only is None else running.decoding[running.decoding == only]
            start = table.num_dispatched[rows]
            block_index = start // table.block_size
            lacking = block_index >= table.num_blocks[rows]
            num_lacking = np.count_nonzero(lacking)
            if num_lacking <= pool.num_allocatable:
                break
            if only is None and running.any_about_to_end:
                served = ~lacking
                served[np.flatnonzero(lacking)[: pool.num_allocatable]] = True
                rows, start, block_index, lacking = rows[served], start[served], block_index[served], lacking[served]
                num_lacking = np.count_nonzero(lacking)
                break
            self._preempt(next(row for row in running.victims() if row != only))
        if num_lacking:
            extend_rows = rows[lacking]
            extend_blocks = self.kv.extend(extend_rows)
        if not len(rows):
            return
        end = step.decode(rows, start, block_index, extend_rows, extend_blocks)
        if (end >= table.max_tokens[rows] - 1).any():
            running.drop_dispatched()

    def _preempt(self, row: int) -> None:
        """Take a row and its blocks from its request, which waits for them to come back."""
        self.backlog.push(self.running.preempt(row))
        self.isolation.note_settled()
        self.stats.preemptions += 1

    # ------------------------------------------------------------------ settle

    def settle(self, result: StepResult) -> Outputs:
        """Take in the result of the oldest step in flight.

        Raises:
            ResultMismatchError: it is another step's, or does not have the step's shape; nothing was changed.
        """
        step, outputs = self._settlement.settle(result)
        self.run_ahead.observe(result.timings, after_idle=step.after_idle)
        self.isolation.note_settled()
        inexact = self._admissions.take_inexact()
        return replace(outputs, best_effort_handles=inexact) if inexact else outputs
