"""Requests over several executors: one front queue, one Scheduler per executor, least-loaded routing."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.request import FinishReason, Request, RequestStatus, SamplingParams
from scheduler_service.core.row_table import MAX_STOP_TOKEN_IDS
from scheduler_service.core.scheduler import ExecutorCapacity, FinishedRequest, Outputs, Scheduler
from scheduler_service.core.step_plan import StepPlan, StepResult
from scheduler_service.core.waiting_queue import WaitingQueue

# An executor gets at most this many requests beyond the running ones: the others stay in front, for whoever has room.
_MAX_WAITING_PER_EXECUTOR = 32


class Cluster:
    """Owns every live request. Times are seconds of any steadily growing clock, passed in."""

    def __init__(self, max_queued_requests: int, run_ahead: int | None = None) -> None:
        self.executors: dict[str, Scheduler] = {}
        self.max_total_tokens = 0  # of one request, over all executors seen; 0 = none has joined yet
        self._max_queued_requests = max_queued_requests
        self._run_ahead = run_ahead
        self._front = WaitingQueue()
        self._requests: dict[int, Request] = {}
        self._homes: dict[int, Scheduler] = {}  # handle -> the scheduler it was routed to
        self._queued_at: dict[int, float] = {}  # handle -> since when in the front queue, in the order of these times
        self._next_arrival = 0

    @property
    def num_queued(self) -> int:
        """Requests in the front queue."""
        return len(self._front)

    @property
    def oldest_queued_at(self) -> float | None:
        """Since when the request that has waited longest is in the front queue; None if nobody waits."""
        return next(iter(self._queued_at.values()), None)

    @property
    def num_requests(self) -> int:
        """Live requests, queued or on an executor."""
        return len(self._requests)

    def add_request(
        self,
        handle: int,
        prompt_token_ids: NDArray[np.int32],
        max_tokens: int,
        sampling: SamplingParams,
        stop_token_ids: tuple[int, ...],
        now: float,
    ) -> FinishedRequest | None:
        """Queue a request; its end if it cannot be taken."""
        if handle in self._requests:
            return FinishedRequest(handle, FinishReason.REJECTED, message="the handle is in use")
        if not len(prompt_token_ids) or max_tokens < 1 or len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            return FinishedRequest(handle, FinishReason.REJECTED, message="the request was not validated")
        if len(self._front) >= self._max_queued_requests:
            return FinishedRequest(handle, FinishReason.OVERLOADED, message="the queue is full")
        if len(prompt_token_ids) + max_tokens > self.max_total_tokens:
            message = f"prompt and max_tokens exceed the {self.max_total_tokens} tokens that the cluster can hold"
            return FinishedRequest(handle, FinishReason.REJECTED, message=message)
        request = Request(handle, self._next_arrival, prompt_token_ids, max_tokens, sampling, stop_token_ids)
        self._next_arrival += 1
        self._requests[handle] = request
        self._queue(request, now)
        return None

    def abort(self, handle: int) -> FinishedRequest | None:
        """End a request; None if it has already ended."""
        request = self._requests.pop(handle, None)
        if request is None:
            return None
        home = self._homes.pop(handle, None)
        if home is not None:
            home.abort(request)
        else:
            self._drop_queued(request)
        return FinishedRequest(handle, FinishReason.ABORT, request.num_cached_tokens or 0)

    def executor_ready(self, executor_id: str, capacity: ExecutorCapacity) -> None:
        """An executor takes plans from now on, with empty rows and tables."""
        self.executors[executor_id] = Scheduler(capacity, self._run_ahead)
        self.max_total_tokens = max(self.max_total_tokens, capacity.max_total_tokens)

    def executor_lost(self, executor_id: str, now: float) -> int:
        """Queue an executor's requests again, with their logs, in the order of their arrival; their number."""
        requests = self.executors.pop(executor_id).take_all()
        for request in requests:
            del self._homes[request.handle]
            self._queue(request, now)
        return len(requests)

    def schedule(self, executor_id: str) -> StepPlan | None:
        """The executor's next plan, or None: no credit left, or nothing to run."""
        self._route()
        return self.executors[executor_id].schedule()

    def settle(self, executor_id: str, result: StepResult) -> Outputs:
        """Take in a result.

        Raises:
            ResultMismatchError: it does not fit the executor's oldest step in flight.
        """
        outputs = self.executors[executor_id].settle(result)
        for end in outputs.finished:
            del self._requests[end.handle]
            del self._homes[end.handle]
        return outputs

    def expire(self, now: float, timeout: float) -> list[FinishedRequest]:
        """End requests that no present executor can take and that have waited for longer than ``timeout`` seconds."""
        ends = []
        for request in self._front.requests():
            if now - self._queued_at[request.handle] > timeout and not self._fitting(request):
                del self._requests[request.handle]
                self._drop_queued(request)
                message = f"no executor could take the request within {timeout:g} s"
                ends.append(FinishedRequest(request.handle, FinishReason.UNAVAILABLE, message=message))
        return ends

    def _queue(self, request: Request, now: float) -> None:
        self._queued_at[request.handle] = now
        self._front.push(request)

    def _drop_queued(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED
        self._front.discard(request)
        del self._queued_at[request.handle]

    def _fitting(self, request: Request) -> list[Scheduler]:
        return [s for s in self.executors.values() if request.max_total_tokens <= s.capacity.max_total_tokens]

    def _route(self) -> None:
        """Hand queued requests to the least loaded executors that have room, in the order of their arrival."""
        postponed = []
        while (request := self._front.peek()) is not None:
            fitting = self._fitting(request)
            target = _least_loaded(s for s in fitting if s.num_waiting < _MAX_WAITING_PER_EXECUTOR)
            if target is None and fitting:
                break
            self._front.pop()
            if target is None:  # nobody present is large enough: the others need not wait for it
                postponed.append(request)
                continue
            del self._queued_at[request.handle]
            self._homes[request.handle] = target
            target.add_request(request)
        for request in postponed:
            self._front.push(request)


def _least_loaded(schedulers: Iterable[Scheduler]) -> Scheduler | None:
    """The scheduler with the smallest share of its rows asked for; the first of equals."""
    return min(schedulers, key=lambda s: (s.num_running + s.num_waiting) / s.capacity.max_rows, default=None)
