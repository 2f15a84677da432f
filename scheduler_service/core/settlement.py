"""Takes results in: tokens into logs, filled blocks into the cache; out come tokens, log probabilities and ends."""

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.inflight import InflightLedger, InflightStep, ResultMismatchError
from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.outputs import FinishedRequest, Outputs, PromptLogprobs, finish
from scheduler_service.core.request import FinishReason, Request
from scheduler_service.core.row_table import Rows
from scheduler_service.core.running import RunningRows
from scheduler_service.core.stats import SchedulerStats
from scheduler_service.core.step_plan import Int32s, RowPromptLogprobs, StepResult
from scheduler_service.core.waiting_queue import Backlog

_BAD_LOGITS = "the model's logits were not finite, or its grammar and its token lists allow nothing"
_NO_INDICES = np.zeros(0, np.intp)

Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]


class Settlement:
    """Settles one executor's steps in the order in which they were dispatched."""

    def __init__(
        self,
        ledger: InflightLedger,
        running: RunningRows,
        backlog: Backlog,
        stats: SchedulerStats,
        vocab_size: int,
    ) -> None:
        self._ledger = ledger
        self._running = running
        self._table = running.table
        self._backlog = backlog
        self._stats = stats
        self._vocab_size = vocab_size

    def settle(self, result: StepResult) -> tuple[InflightStep, Outputs]:
        """Take in the result of the oldest step in flight; that step, and what became known.

        Raises:
            ResultMismatchError: it is another step's, or does not have the step's shape; nothing was changed.
        """
        step = self._ledger.expect(result.step_id, len(result.token_ids))
        self._check(step, result)
        news = [self._new_prompt_logprobs(step, item) for item in result.prompt_logprobs]
        self._ledger.pop()
        self._count(step, result)
        prompt_logprobs = [_deliver(*new) for new in news if new is not None]
        holds = self._table.admission[step.rows] == step.admissions
        self._table.num_settled[step.rows[holds]] = step.end_positions[holds]
        rows, admissions = step.rows, step.admissions
        if step.samples is not None:
            rows, admissions, holds = rows[step.samples], admissions[step.samples], holds[step.samples]
        ended = result.grammar_ended != 0 if len(result.grammar_ended) else None
        if holds.all() and not result.row_status.any():
            handles, finished = self._append(rows, result.token_ids, ended)
            indices, logprobs = step.logprob_samples, result.logprobs
            if indices is None:
                return step, Outputs(handles, result.token_ids, finished, prompt_logprobs=prompt_logprobs)
            return step, Outputs(handles, result.token_ids, finished, indices, logprobs, prompt_logprobs)
        positions, handles, finished = self._append_some(rows, admissions, holds, result)
        indices, logprobs = _logprobs_at(positions, step, result.logprobs)
        return step, Outputs(handles, result.token_ids[positions], finished, indices, logprobs, prompt_logprobs)

    def _check(self, step: InflightStep, result: StepResult) -> None:
        token_ids, count = result.token_ids, len(result.token_ids)
        problem = ""
        if count and not 0 <= token_ids.min() <= token_ids.max() < self._vocab_size:
            problem = "a token id out of the vocabulary"
        elif len(result.row_status) not in (0, count) or len(result.grammar_ended) not in (0, count):
            problem = "states of other rows than it sampled"
        elif (0 if result.logprobs is None else len(result.logprobs)) != step.num_logprobs:
            problem = "log probabilities of other rows than asked for them"
        elif result.logprobs is not None and not result.logprobs.is_consistent:
            problem = "log probabilities that contradict themselves"
        elif len(result.audit_mismatch_rows) > result.audited_tokens:
            problem = "more mismatches than audited tokens"
        if problem:
            raise ResultMismatchError(f"step {result.step_id} answered {problem}")

    def _count(self, step: InflightStep, result: StepResult) -> None:
        stats = self._stats
        stats.computed_tokens += step.num_tokens
        stats.sampled_tokens += step.num_samples
        stats.device_us += result.timings.device_us
        stats.starved_us += 0 if step.after_idle else result.timings.starved_us
        stats.audited_tokens += result.audited_tokens
        stats.audit_mismatches += len(result.audit_mismatch_rows)

    def _new_prompt_logprobs(
        self, step: InflightStep, item: RowPromptLogprobs
    ) -> tuple[Request, LogprobColumns] | None:
        """The request and what it has not had yet; None where there is nothing to deliver.

        Raises:
            ResultMismatchError: the step does not compute these positions, or some before them are missing.
        """
        at = np.flatnonzero(step.rows == item.row)
        if not len(at) or not item.logprobs.is_consistent:
            raise ResultMismatchError(f"step {step.step_id} answered prompt log probabilities of row {item.row}")
        request = self._running.holder(item.row, int(step.admissions[at[0]]))
        if request is None:
            return None
        start, end = item.start_position, item.start_position + len(item.logprobs)
        known, asked = request.next_prompt_logprob, request.sampling.num_prompt_logprobs is not None
        if not asked or start > known or end > request.num_prompt_tokens:
            raise ResultMismatchError(f"step {step.step_id} answered log probabilities of positions {start} to {end}")
        if end <= known:
            return None
        return request, item.logprobs.take(np.arange(known - start, end - start))

    def _append(
        self, rows: Rows, token_ids: Int32s, ended: Bools | None
    ) -> tuple[NDArray[np.int64], list[FinishedRequest]]:
        """One token for each of ``rows``, which hold what they held; their handles, and who has ended with it."""
        stopped, at_limit = self._table.append_token_each(rows, token_ids)
        if ended is not None:
            stopped |= ended
        handles = self._table.handle[rows]
        over = stopped | at_limit
        if not over.any():
            return handles, []
        finished = []
        endings = zip(rows[over].tolist(), stopped[over].tolist(), token_ids[over].tolist(), strict=True)
        for row, stop, token_id in endings:
            reason = FinishReason.STOP if stop else FinishReason.LENGTH
            finished.append(finish(self._running.vacate(row), reason, stop_token_id=token_id))
        self._running.forget_vacant()
        return handles, finished

    def _append_some(
        self, rows: Rows, admissions: NDArray[np.int64], holds: Bools, result: StepResult
    ) -> tuple[Indices, NDArray[np.int64], list[FinishedRequest]]:
        """As ``_append`` where rows have failed or changed hands; first, which of the tokens were kept."""
        good = result.row_status == 0 if len(result.row_status) else np.ones(len(rows), np.bool_)
        ended = result.grammar_ended != 0 if len(result.grammar_ended) else np.zeros(len(rows), np.bool_)
        failed = [
            finish(self._running.vacate(row, is_sound=False), FinishReason.ERROR, _BAD_LOGITS)
            for row in rows[holds & ~good].tolist()
        ]
        self._running.forget_vacant()
        kept = holds & good
        handles, finished = self._append(rows[kept], result.token_ids[kept], ended[kept])
        late, late_handles, late_finished = self._append_departed(admissions, ~holds, result.token_ids, good, ended)
        positions = np.concatenate([np.flatnonzero(kept), np.array(late, np.intp)])
        handles = np.concatenate([handles, np.array(late_handles, np.int64)])
        return positions, handles, failed + finished + late_finished

    def _append_departed(
        self, admissions: NDArray[np.int64], departed: Bools, token_ids: Int32s, good: Bools, ended: Bools
    ) -> tuple[list[int], list[int], list[FinishedRequest]]:
        """Tokens of rows that have changed hands: a preempted request keeps them, an ended one does not."""
        kept, handles, finished = [], [], []
        for position in np.flatnonzero(departed).tolist():
            admission = int(admissions[position])
            request = self._running.departed.get(admission)
            if request is None:
                self._stats.stale_tokens += 1
                continue
            reason: FinishReason | None = FinishReason.ERROR
            token_id = int(token_ids[position])
            if good[position]:
                kept.append(position)
                handles.append(request.handle)
                reason = request.append(token_id)
                if ended[position]:
                    reason = FinishReason.STOP
            if reason is not None:
                del self._running.departed[admission]
                self._backlog.discard(request)
                message = "" if good[position] else _BAD_LOGITS
                finished.append(finish(request, reason, message, token_id))
        return kept, handles, finished


def _deliver(request: Request, logprobs: LogprobColumns) -> PromptLogprobs:
    start = request.next_prompt_logprob
    request.next_prompt_logprob = start + len(logprobs)
    return PromptLogprobs(request.handle, start, logprobs)


def _logprobs_at(
    positions: Indices, step: InflightStep, logprobs: LogprobColumns | None
) -> tuple[Indices, LogprobColumns | None]:
    """Which of the tokens at ``positions`` of a step have log probabilities, and theirs."""
    if logprobs is None or step.logprob_samples is None:
        return _NO_INDICES, None
    entries = np.full(step.num_samples, -1, np.intp)
    entries[step.logprob_samples] = np.arange(len(logprobs))
    entries = entries[positions]
    indices = np.flatnonzero(entries >= 0)
    return indices, logprobs.take(entries[indices]) if len(indices) else None
