"""Schedules one executor: turns waiting and running requests into step plans, and results into outputs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.inflight import MAX_RUN_AHEAD, InflightLedger, InflightStep, ResultMismatchError, RunAhead
from scheduler_service.core.kv_cache_manager import KVCacheManager
from scheduler_service.core.request import FinishReason, Request, RequestStatus
from scheduler_service.core.row_table import NO_ADMISSION, Rows, RowTable
from scheduler_service.core.step_plan import (
    EXPLICIT,
    SAMPLE,
    Admission,
    DecodeColumns,
    Int32s,
    PrefillColumns,
    StepPlan,
    StepResult,
    concatenate,
    join,
)
from scheduler_service.core.waiting_queue import WaitingQueue

_NO_ROWS = np.zeros(0, np.intp)
_NO_BLOCKS = np.zeros(0, np.int32)
_BAD_LOGITS = "the model's logits were not finite"


@dataclass(frozen=True, slots=True)
class ExecutorCapacity:
    """What an executor reports of itself. ``max_rows`` must not exceed ``max_batched_tokens``."""

    block_size: int
    num_blocks: int
    max_rows: int
    max_batched_tokens: int
    max_model_len: int
    vocab_size: int

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output that can ever run: the last token needs no KV."""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request's end, reported once. ``num_cached_tokens`` of its prompt came from the prefix cache."""

    handle: int
    reason: FinishReason
    num_cached_tokens: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What became known: ``token_ids[i]`` is the next token of ``handles[i]`` (int64), and who finished with it."""

    handles: NDArray[np.int64]
    token_ids: Int32s
    finished: list[FinishedRequest]


def merge(outputs: list[Outputs]) -> Outputs:
    """Several outputs as one, in order; ``outputs`` is not empty."""
    if len(outputs) == 1:
        return outputs[0]
    return Outputs(
        np.concatenate([part.handles for part in outputs]),
        np.concatenate([part.token_ids for part in outputs]),
        [end for part in outputs for end in part.finished],
    )


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the executor joined."""

    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    starved_us: int = 0
    device_us: int = 0
    stale_tokens: int = 0  # sampled for requests that had already ended


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
        self.waiting = WaitingQueue()
        self.ledger = InflightLedger()
        self.run_ahead = RunAhead(run_ahead)
        self.stats = SchedulerStats()
        self._decoding: Rows = _NO_ROWS  # rows past their known tokens, in order of admission
        self._prefilling: list[int] = []  # rows that still have known tokens to compute, in order of admission
        self._released_rows: list[int] = []  # since the last plan
        self._departed: dict[int, Request] = {}  # admission -> request preempted while steps of it are in flight
        self._idle = True

    # ---------------------------------------------------------------- requests

    @property
    def num_running(self) -> int:
        return self.rows.num_running

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def add_request(self, request: Request) -> None:
        """Queue a request that fits (``max_total_tokens`` within the capacity's)."""
        self.waiting.push(request)

    def abort(self, request: Request) -> None:
        """End a request at once; its row and blocks are free for the next plan, tokens in flight are dropped."""
        was_waiting = request.row < 0
        if not was_waiting:
            self._vacate(request.row)
            self._forget_vacant_rows()
        request.status = RequestStatus.FINISHED
        if was_waiting:
            self.waiting.discard(request)
            self._departed = {a: r for a, r in self._departed.items() if r is not request}

    def take_all(self) -> list[Request]:
        """The executor is gone: all its requests with their logs, ready to be queued elsewhere. Ends this scheduler."""
        requests = self.waiting.requests()
        requests += [self.rows.vacate(row) for row in range(self.rows.max_rows) if self.rows.requests[row]]
        for request in requests:
            request.status = RequestStatus.WAITING
            request.last_step = 0
            request.block_hashes = []  # the next executor's blocks may be of another size
        return requests

    # ---------------------------------------------------------------- schedule

    def schedule(self) -> StepPlan | None:
        """The next step, or None: no credit left, or nothing to run."""
        if not self._has_credit():
            return None
        step_id = self.ledger.next_step_id
        preemptions = self.stats.preemptions
        self.kv.cache.begin_plan()
        decode = self._schedule_decodes(step_id)
        prefill = PrefillColumns()
        budget = self.capacity.max_batched_tokens - len(decode.rows)
        budget = self._continue_prefills(prefill, budget, step_id)
        if self.stats.preemptions == preemptions:
            self._admit_waiting(prefill, budget, step_id)
        if not len(decode.rows) and not prefill.rows:
            self._idle = True
            return None
        plan = self._build_plan(step_id, decode, prefill)
        self.ledger.push(self._inflight_step(plan))
        self._idle = False
        return plan

    def _has_credit(self) -> bool:
        in_flight = len(self.ledger)
        if in_flight >= self.run_ahead.depth:
            return False
        # Long prefill steps hide any latency: more than two of them would only delay new arrivals.
        return in_flight < 2 or self.ledger.num_tokens < 2 * self.capacity.max_batched_tokens

    def _schedule_decodes(self, step_id: int) -> DecodeColumns:
        table, block_size = self.rows, self.capacity.block_size
        extend_rows, extend_blocks = _NO_ROWS, _NO_BLOCKS
        while True:
            rows = self._decoding
            start = table.num_dispatched[rows]
            block_index = start // block_size
            lacking = block_index >= table.num_blocks[rows]
            num_lacking = np.count_nonzero(lacking)
            if num_lacking <= self.kv.pool.num_allocatable:
                break
            if self._has_rows_about_to_end():
                served = ~lacking
                served[np.flatnonzero(lacking)[: self.kv.pool.num_allocatable]] = True
                rows, start, block_index, lacking = rows[served], start[served], block_index[served], lacking[served]
                num_lacking = np.count_nonzero(lacking)
                break
            self._preempt_youngest()
        if num_lacking:
            extend_rows = rows[lacking]
            extend_blocks = self.kv.extend(extend_rows)
        slots = table.block_table[rows, block_index] * block_size + start % block_size
        end = start + 1
        table.num_dispatched[rows] = end
        table.last_step[rows] = step_id
        if (end >= table.max_tokens[rows] - 1).any():
            self._decoding = self._decoding[table.num_dispatched[self._decoding] < table.max_tokens[self._decoding] - 1]
        return DecodeColumns(rows, start, slots, extend_rows.astype(np.int32), extend_blocks)

    def _has_rows_about_to_end(self) -> bool:
        """Whether some rows have all their steps in flight: their blocks come back without preempting anybody."""
        return self.num_running > len(self._decoding) + len(self._prefilling)

    def _continue_prefills(self, prefill: PrefillColumns, budget: int, step_id: int) -> int:
        for row in list(self._prefilling):
            if budget == 0:
                break
            budget -= self._schedule_chunk(prefill, row, budget, step_id)
        return budget

    def _admit_waiting(self, prefill: PrefillColumns, budget: int, step_id: int) -> None:
        postponed: list[Request] = []
        while budget > 0 and self.rows.has_free_row and (request := self.waiting.peek()) is not None:
            if request.last_step > self.ledger.settled_step:
                break  # preempted; tokens of its former admission are still in flight
            matched = self.kv.match(request)
            if matched is None:
                postponed.append(self.waiting.pop())
                continue
            if not self.kv.can_admit(request, matched, self._reserve()):
                break
            self.waiting.pop()
            row = self._admit(request, matched)
            prefill.admissions.append(
                Admission(row, self.rows.blocks(row).copy(), request.num_prompt_tokens, request.sampling)
            )
            budget -= self._schedule_chunk(prefill, row, budget, step_id)
        for request in postponed:
            self.waiting.push(request)

    def _reserve(self) -> int:
        """Blocks an admission leaves allocatable, so that run-ahead alone never makes running rows preempt."""
        running = self.num_running
        return self.kv.num_blocks_for(MAX_RUN_AHEAD * (running + 1)) if running else 0

    def _admit(self, request: Request, matched: list[int]) -> int:
        row = self.rows.occupy(request)
        self.kv.admit(request, row, matched)
        cached = len(matched) * self.capacity.block_size
        self.rows.num_dispatched[row] = cached
        self.rows.num_settled[row] = cached
        self._prefilling.append(row)
        self._departed = {a: r for a, r in self._departed.items() if r is not request}
        request.status = RequestStatus.RUNNING
        if request.num_cached_tokens is None:
            request.num_cached_tokens = cached
        self.stats.prefix_hit_tokens += cached
        self.stats.prefix_query_tokens += len(request.token_ids)
        return row

    def _schedule_chunk(self, prefill: PrefillColumns, row: int, budget: int, step_id: int) -> int:
        """Schedule as many known tokens of a row as the budget allows; their number."""
        table, block_size = self.rows, self.capacity.block_size
        start, known = int(table.num_dispatched[row]), int(table.num_explicit[row])
        end = min(start + budget, known)
        positions = np.arange(start, end, dtype=np.int32)
        slots = table.block_table[row, positions // block_size] * block_size + positions % block_size
        prefill.add(row, start, table.token_log[row, start:end].copy(), slots, samples=end == known)
        table.num_dispatched[row] = end
        table.last_step[row] = step_id
        self.kv.publish_dispatched(self.rows.request(row), row)
        if end == known:
            self._prefilling.remove(row)
            if end < table.max_tokens[row] - 1:
                self._decoding = np.append(self._decoding, row)
        return end - start

    def _preempt_youngest(self) -> None:
        candidates = np.concatenate([self._decoding, np.array(self._prefilling, np.intp)])
        row = int(candidates[np.argmax(self.rows.admission[candidates])])
        admission = int(self.rows.admission[row])
        request = self._vacate(row)
        self._forget_vacant_rows()
        request.status = RequestStatus.PREEMPTED
        if request.last_step > self.ledger.settled_step:
            self._departed[admission] = request
        self.waiting.push(request)
        self.stats.preemptions += 1

    def _build_plan(self, step_id: int, decode: DecodeColumns, prefill: PrefillColumns) -> StepPlan:
        rows = join(decode.rows.astype(np.int32), prefill.rows)
        released, self._released_rows = self._released_rows, []
        return StepPlan(
            step_id=step_id,
            released_rows=np.array(released, np.int32),
            admissions=tuple(prefill.admissions),
            extend_rows=decode.extend_rows,
            extend_blocks=decode.extend_blocks,
            rows=rows,
            num_tokens=join(np.ones(len(decode.rows), np.int32), prefill.num_tokens),
            start_positions=join(decode.start_positions, prefill.start_positions),
            flags=np.concatenate([np.full(len(decode.rows), SAMPLE, np.uint8), np.array(prefill.flags, np.uint8)]),
            prefill_token_ids=concatenate(prefill.token_ids),
            slot_mapping=concatenate([decode.slots, *prefill.slots]),
            table_hashes=self.rows.table_hash[rows],
            after_idle=self._idle,
        )

    def _inflight_step(self, plan: StepPlan) -> InflightStep:
        rows = plan.rows.astype(np.intp)
        return InflightStep(
            step_id=plan.step_id,
            rows=rows,
            admissions=self.rows.admission[rows],
            end_positions=plan.start_positions + plan.num_tokens,
            samples=np.flatnonzero(plan.flags & SAMPLE) if (plan.flags & EXPLICIT).any() else None,
            num_tokens=len(plan.slot_mapping),
            after_idle=plan.after_idle,
        )

    # ------------------------------------------------------------------ settle

    def settle(self, result: StepResult) -> Outputs:
        """Take in the result of the oldest step in flight.

        Raises:
            ResultMismatchError: it is another step's, or does not have the step's shape; nothing was changed.
        """
        token_ids = result.token_ids
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < self.capacity.vocab_size:
            raise ResultMismatchError(f"step {result.step_id} answered a token id out of the vocabulary")
        if len(result.row_status) not in (0, len(token_ids)):
            raise ResultMismatchError(f"step {result.step_id} answered {len(result.row_status)} row states")
        step = self.ledger.pop(result.step_id, len(token_ids))
        self.run_ahead.observe(result.timings, after_idle=step.after_idle)
        self.stats.device_us += result.timings.device_us
        self.stats.starved_us += 0 if step.after_idle else result.timings.starved_us

        holds = self.rows.admission[step.rows] == step.admissions
        self.rows.num_settled[step.rows[holds]] = step.end_positions[holds]
        rows, ends, admissions = step.rows, step.end_positions, step.admissions
        if step.samples is not None:
            rows, ends, admissions = rows[step.samples], ends[step.samples], admissions[step.samples]
            holds = holds[step.samples]
        good = result.row_status == 0 if len(result.row_status) else np.ones(len(rows), np.bool_)
        if holds.all() and good.all():
            return self._append_tokens(rows, ends, token_ids)
        failed = [self._finish_row(row, FinishReason.ERROR, _BAD_LOGITS) for row in rows[holds & ~good].tolist()]
        settled = self._append_tokens(rows[holds & good], ends[holds & good], token_ids[holds & good])
        late = self._settle_departed(admissions[~holds], token_ids[~holds], good[~holds])
        self._forget_vacant_rows()
        return merge([Outputs(late.handles[:0], late.token_ids[:0], failed), settled, late])

    def _append_tokens(self, rows: Rows, ends: Int32s, token_ids: Int32s) -> Outputs:
        stopped, at_limit = self.rows.append_token_each(rows, token_ids)
        filled = ends % self.capacity.block_size == 0
        if filled.any():
            self.kv.publish_settled(rows[filled], ends[filled])
        handles = self.rows.handle[rows]
        finished = []
        over = stopped | at_limit
        if over.any():
            for row, stop in zip(rows[over].tolist(), stopped[over].tolist(), strict=True):
                finished.append(self._finish_row(row, FinishReason.STOP if stop else FinishReason.LENGTH))
            self._forget_vacant_rows()
        return Outputs(handles, token_ids, finished)

    def _settle_departed(self, admissions: NDArray[np.int64], token_ids: Int32s, good: NDArray[np.bool_]) -> Outputs:
        """Tokens of rows that have changed hands: a preempted request keeps them, an ended one does not."""
        handles, kept, finished = [], [], []
        for admission, token_id, is_good in zip(admissions.tolist(), token_ids.tolist(), good.tolist(), strict=True):
            request = self._departed.get(admission)
            if request is None:
                self.stats.stale_tokens += 1
                continue
            reason: FinishReason | None = FinishReason.ERROR
            if is_good:
                handles.append(request.handle)
                kept.append(token_id)
                reason = request.append(token_id)
            if reason is not None:
                del self._departed[admission]
                request.status = RequestStatus.FINISHED
                self.waiting.discard(request)
                message = "" if is_good else _BAD_LOGITS
                finished.append(FinishedRequest(request.handle, reason, request.num_cached_tokens or 0, message))
        return Outputs(np.array(handles, np.int64), np.array(kept, np.int32), finished)

    def _finish_row(self, row: int, reason: FinishReason, message: str = "") -> FinishedRequest:
        request = self._vacate(row)
        request.status = RequestStatus.FINISHED
        return FinishedRequest(request.handle, reason, request.num_cached_tokens or 0, message)

    def _vacate(self, row: int) -> Request:
        self.kv.release(row)
        self._released_rows.append(row)
        return self.rows.vacate(row)

    def _forget_vacant_rows(self) -> None:
        held = self.rows.admission != NO_ADMISSION
        self._decoding = self._decoding[held[self._decoding]]
        self._prefilling = [row for row in self._prefilling if held[row]]
