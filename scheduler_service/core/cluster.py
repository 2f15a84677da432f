"""Requests over several executors: one front queue, one Scheduler per executor, routing, handover, losses."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core import handover, routing
from scheduler_service.core.outputs import FinishedRequest, Outputs, finish
from scheduler_service.core.queue_timeouts import QueueTimeouts
from scheduler_service.core.request import DEFAULT_SALT, FinishReason, Request, SamplingParams
from scheduler_service.core.row_table import MAX_STOP_TOKEN_IDS
from scheduler_service.core.scheduler import ExecutorCapacity, Scheduler
from scheduler_service.core.step_plan import NO_TOKENS, StepPlan, StepResult
from scheduler_service.core.suspicion import DeathRecord
from scheduler_service.core.waiting_queue import WaitingQueue


class ExecutorState(Enum):
    SERVING = auto()
    PAUSED = auto()  # gets no new requests
    DRAINING = auto()  # hands its requests over, as far as others can take them


@dataclass(frozen=True, slots=True)
class LossReport:
    """What became of a lost executor's requests: how many were queued again, and those that are given up."""

    num_requeued: int
    failed: list[FinishedRequest]


class Cluster:
    """Owns every live request. Times are seconds of any steadily growing clock, passed in."""

    def __init__(self, max_queued_requests: int, run_ahead: int | None = None) -> None:
        self.executors: dict[str, Scheduler] = {}
        self.max_total_tokens = 0  # of one request, over all executors seen; 0 = none has joined yet
        self._max_queued_requests = max_queued_requests
        self._run_ahead = run_ahead
        self._states: dict[str, ExecutorState] = {}
        self._front = WaitingQueue()
        self._requests: dict[int, Request] = {}
        self._homes: dict[int, str] = {}  # handle -> the executor it was routed to
        self._moves: dict[int, str] = {}  # handle -> the executor that it is handed over to, until it is routed there
        self._queued_at: dict[int, float] = {}  # handle -> since when in the front queue, in the order of these times
        self._timeouts = QueueTimeouts()
        self._due: dict[str, None] = {}  # executors that may have a plan to give, in the order of becoming so
        self._may_route = False  # something has changed that may let queued requests go on
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

    @property
    def num_serving(self) -> int:
        """Executors that take new requests."""
        return sum(state is ExecutorState.SERVING for state in self._states.values())

    def queued_requests(self) -> list[Request]:
        """Requests in the front queue, in order."""
        return self._front.requests()

    def handles(self) -> list[int]:
        """All live requests, for integrity checks."""
        return list(self._requests)

    def moving(self) -> list[Request | None]:
        """Those on their way from one executor to another, for integrity checks; None for one that is not live."""
        return [self._requests.get(handle) for handle in self._moves]

    # ---------------------------------------------------------------- requests

    def add_request(
        self,
        handle: int,
        prompt_token_ids: NDArray[np.int32],
        max_tokens: int,
        sampling: SamplingParams,
        now: float,
        *,
        output_token_ids: NDArray[np.int32] = NO_TOKENS,
        cache_salt: bytes = b"",
        priority: int = 0,
        queue_timeout: float = 0.0,
    ) -> FinishedRequest | None:
        """Queue a request; its end if it cannot be taken, or needs nothing more.

        Args:
            handle: unique among live requests.
            prompt_token_ids: int32, at least one.
            max_tokens: most output tokens, those it comes with included.
            sampling: how it samples.
            now: seconds.
            output_token_ids: int32; output of the same request from elsewhere, which it goes on from.
            cache_salt: 32 bytes that its prefix must share to be shared; empty = the default.
            priority: lower runs first.
            queue_timeout: seconds within which it must start; 0 = as long as ``expire`` says.
        """
        if handle in self._requests:
            return FinishedRequest(handle, FinishReason.REJECTED, message="the handle is in use")
        is_valid = len(prompt_token_ids) and max_tokens >= 1 and len(sampling.stop_token_ids) <= MAX_STOP_TOKEN_IDS
        if not is_valid or len(cache_salt) not in (0, len(DEFAULT_SALT)) or len(output_token_ids) > max_tokens:
            return FinishedRequest(handle, FinishReason.REJECTED, message="the request was not validated")
        if len(self._front) >= self._max_queued_requests:
            return FinishedRequest(handle, FinishReason.OVERLOADED, message="the queue is full")
        if len(prompt_token_ids) + max_tokens > self.max_total_tokens:
            message = f"prompt and max_tokens exceed the {self.max_total_tokens} tokens that the cluster can hold"
            return FinishedRequest(handle, FinishReason.REJECTED, message=message)
        request = Request(
            handle,
            self._next_arrival,
            prompt_token_ids,
            max_tokens,
            sampling,
            output_token_ids=output_token_ids,
            salt=cache_salt or DEFAULT_SALT,
            priority=priority,
            received_at=now,
            starts_by=now + queue_timeout if queue_timeout else None,
        )
        over = request.is_over() if len(output_token_ids) else None
        if over is not None:
            return finish(request, over, stop_token_id=int(request.token_ids[-1]))
        self._next_arrival += 1
        self._requests[handle] = request
        self._queue(request, now)
        if request.starts_by is not None:
            self._timeouts.add(request, request.starts_by)
        return None

    def abort(self, handle: int) -> FinishedRequest | None:
        """End a request; None if it has already ended."""
        request = self._requests.get(handle)
        return None if request is None else self._end(request, FinishReason.ABORT)

    def hold(self, handle: int, held: bool) -> None:
        """Stop planning steps for a request, or go on; unknown handles are ignored."""
        request = self._requests.get(handle)
        if request is None or request.is_held == held:
            return
        self._may_route = True  # a held one keeps nobody in front of an executor
        self._moves.pop(handle, None)
        home = self._homes.get(handle)
        if home is not None:
            self.executors[home].set_held(request, held)
            self._due[home] = None
        else:
            self._front.discard(request)
            request.is_held = held
            self._front.push(request)

    def expire(self, now: float, timeout: float) -> list[FinishedRequest]:
        """End requests that no present executor can take and that have waited for longer than ``timeout`` seconds.

        Those that have not started and came with a limit of their own are left to ``expire_unstarted``.
        """
        ends = []
        for request in self._front.requests():
            if request.starts_by is not None and request.started_at is None:
                continue
            if now - self._queued_at[request.handle] > timeout and not self._serving(request):
                message = f"no executor could take the request within {timeout:g} s"
                ends.append(self._end(request, FinishReason.UNAVAILABLE, message))
        return ends

    def expire_unstarted(self, now: float) -> list[FinishedRequest]:
        """End requests that have not started within their own ``queue_timeout``."""
        message = "the request could not start within its queue_timeout_ms"
        return [self._end(one, FinishReason.UNAVAILABLE, message) for one in self._timeouts.pop_due(now)]

    # --------------------------------------------------------------- executors

    def executor_ready(self, executor_id: str, capacity: ExecutorCapacity, now: float) -> None:
        """An executor takes plans from now on, with empty rows and tables; it may relieve the others.

        Raises:
            MemoryError: its tables do not fit into memory; nothing was changed.
        """
        joined = Scheduler(capacity, self._run_ahead)
        for scheduler in self.executors.values():
            self._take_back(scheduler, now, lambda _: True)
        self.executors[executor_id] = joined
        self._set_state(executor_id, ExecutorState.SERVING)
        self.max_total_tokens = max(self.max_total_tokens, capacity.max_total_tokens)

    def executor_lost(self, executor_id: str, now: float, faulty_step: int | None = None) -> LossReport:
        """Queue an executor's requests again, with their logs, in their order; give up those that keep killing it.

        Args:
            executor_id: who is gone.
            now: seconds.
            faulty_step: the step in flight in which it failed, if it could still say so: steps after this one had not
                begun, and nobody is suspected for them.
        """
        scheduler = self.executors.pop(executor_id)
        del self._states[executor_id]
        self._due.pop(executor_id, None)
        in_flight = scheduler.tokens_in_flight(faulty_step)
        running = {request.handle for request, _ in in_flight}
        running.update(request.handle for request in scheduler.rows.requests if request is not None)
        requests = scheduler.take_all()
        for request, num_tokens in in_flight:
            if request.deaths is None:
                request.deaths = DeathRecord()
            request.deaths.note_death(len(request.token_ids), num_tokens)
        failed = []
        for request in requests:
            del self._homes[request.handle]
            self._moves.pop(request.handle, None)
            request.executor_losses += request.handle in running
            self._queue(request, now)
            if request.deaths is not None and request.deaths.is_condemned:
                failed.append(self._end(request, FinishReason.ERROR, request.deaths.describe()))
        return LossReport(len(requests) - len(failed), failed)

    def rebalance(self, now: float) -> None:
        """Let requests that wait on one executor go to another that could run them at once."""
        serving = [one for name, one in self.executors.items() if self._states[name] is ExecutorState.SERVING]
        if any(not one.num_waiting and one.num_running < one.capacity.max_rows for one in serving):
            for scheduler in serving:
                self._take_back(scheduler, now, lambda _: True)

    def state(self, executor_id: str) -> ExecutorState:
        """Whether an executor serves."""
        return self._states[executor_id]

    def drain_executor(self, executor_id: str) -> None:
        """No new work; its requests go to others as soon as nothing of them is in flight, where others can take them.

        Those that only this executor can take stay and finish, or move when another one joins.
        """
        self._set_state(executor_id, ExecutorState.DRAINING)

    def pause_executor(self, executor_id: str) -> None:
        """No new requests; those that wait there may go to others, those that run go on."""
        if self._states[executor_id] is ExecutorState.SERVING:
            self._set_state(executor_id, ExecutorState.PAUSED)

    def resume_executor(self, executor_id: str) -> None:
        """New requests again, also where a drain had begun."""
        self._set_state(executor_id, ExecutorState.SERVING)

    def is_drained(self, executor_id: str) -> bool:
        """Whether a draining executor has no request and nothing in flight any more."""
        scheduler = self.executors[executor_id]
        is_empty = not scheduler.num_running and not scheduler.num_waiting and not len(scheduler.ledger)
        return is_empty and self._states[executor_id] is ExecutorState.DRAINING

    def take_due(self) -> list[str]:
        """Executors of which something has changed since they were named last; no other has a plan to give.

        An executor that has given a plan may have another one to give.
        """
        self._route()
        due, self._due = self._due, {}
        return list(due)

    def schedule(self, executor_id: str, now: float) -> StepPlan | None:
        """The executor's next plan, or None: no credit left, or nothing to run."""
        scheduler = self.executors[executor_id]
        state = self._states[executor_id]
        if state is ExecutorState.DRAINING:
            scheduler.vacate_rows(self._can_be_served)
        if state is not ExecutorState.SERVING:
            self._take_back(scheduler, now, self._can_be_served)
        elif len(self.executors) > 1 and handover.looks_now(scheduler):
            self._relieve(scheduler)
        if self._moves:
            self._take_back(scheduler, now, lambda request: request.handle in self._moves)
        self._route()
        plan = scheduler.schedule(now)
        if plan is not None and plan.admissions:
            self._may_route = True
        return plan

    def settle(self, executor_id: str, result: StepResult) -> Outputs:
        """Take in a result.

        Raises:
            ResultMismatchError: it does not fit the executor's oldest step in flight.
        """
        outputs = self.executors[executor_id].settle(result)
        self._due[executor_id] = None
        for end in outputs.finished:
            del self._requests[end.handle]
            del self._homes[end.handle]
            self._moves.pop(end.handle, None)
            self._may_route = True
        return outputs

    # ----------------------------------------------------------------- routing

    def _queue(self, request: Request, now: float) -> None:
        self._queued_at[request.handle] = now
        self._front.push(request)
        self._may_route = True

    def _set_state(self, executor_id: str, state: ExecutorState) -> None:
        """Whatever it is, others may have to take its requests, or it theirs."""
        self._states[executor_id] = state
        self._may_route = True
        self._due.update(dict.fromkeys(self.executors))

    def _end(self, request: Request, reason: FinishReason, message: str = "") -> FinishedRequest:
        """End a live request wherever it is."""
        del self._requests[request.handle]
        home = self._homes.pop(request.handle, None)
        self._moves.pop(request.handle, None)
        self._may_route = True
        if home is not None:
            self.executors[home].abort(request)
            self._due[home] = None
        else:
            self._front.discard(request)
            del self._queued_at[request.handle]
        return finish(request, reason, message)

    def _relieve(self, scheduler: Scheduler) -> None:
        """Hand some of a busy executor's running requests over to an idler one, once nothing of them is in flight.

        Nobody moves while somebody waits in front, or is on the way to the same executor.
        """
        if self._front.peek() is not None:
            return
        arriving = set(self._moves.values())
        able = [
            (name, one)
            for name, one in self.executors.items()
            if self._states[name] is ExecutorState.SERVING and name not in arriving
        ]
        target = handover.choose_target(scheduler, able)
        if target is not None:
            requests = handover.choose_requests(scheduler, self.executors[target])
            scheduler.hand_over(requests)
            self._moves.update((request.handle, target) for request in requests)

    def _take_back(self, scheduler: Scheduler, now: float, may_leave: Callable[[Request], bool]) -> None:
        """Requests that wait on an executor go through the front queue again."""
        for request in scheduler.take_idle(may_leave):
            del self._homes[request.handle]
            self._queue(request, now)

    def _serving(self, request: Request) -> dict[str, Scheduler]:
        """Executors that take new requests and are large enough for this one."""
        return {
            executor_id: scheduler
            for executor_id, scheduler in self.executors.items()
            if self._states[executor_id] is ExecutorState.SERVING
            and request.max_total_tokens <= scheduler.capacity.max_total_tokens
        }

    def _can_be_served(self, request: Request) -> bool:
        return bool(self._serving(request))

    def _route(self) -> None:
        """Hand queued requests to the executors that have room, in order."""
        if not self._may_route:
            return
        self._may_route = False
        postponed = []
        while (request := self._front.peek()) is not None:
            serving = self._serving(request)
            with_room = {name: one for name, one in serving.items() if routing.has_room(one, request)}
            target = self._moves.get(request.handle)
            if target not in with_room:
                target = routing.choose(request, with_room)
            if target is None and serving:
                break
            self._front.pop()
            if target is None:  # nobody present is large enough: the others need not wait for it
                postponed.append(request)
                continue
            del self._queued_at[request.handle]
            self._moves.pop(request.handle, None)
            self._homes[request.handle] = target
            self._due[target] = None
            self.executors[target].add_request(request)
        for request in postponed:
            self._front.push(request)
