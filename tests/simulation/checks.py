"""What must hold at every moment, looked at from within; what callers see is checked by the callers."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from baton_protos import execution_pb2
from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.messages import Outputs as ApiOutputs
from scheduler_service.core.cluster import Cluster, ExecutorState, LossReport
from scheduler_service.core.inflight import MAX_RUN_AHEAD
from scheduler_service.core.invariants import IntegrityError, check_cluster
from scheduler_service.core.outputs import Outputs
from scheduler_service.core.routing import has_room
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.step_plan import StepPlan
from scheduler_service.engine.executor_session import Event, ExecutorJoined, StepFinished
from scheduler_service.engine.loop import EngineLoop

_FULL_CHECK_EVENTS = 256
_STATS = ("preemptions", "handovers", "prefix_hit_tokens", "stale_tokens", "audited_tokens")
_MAX_WAITING = 128  # on one executor, over all priorities, beside those that it has preempted
# Tokens that may still come for a stream after its hold was sent: what is in flight, and on its way to the engine.
_UNREAD_SLACK = 2 * MAX_RUN_AHEAD


@dataclass
class Names:
    """Which caller's request is behind what the engine knows of it."""

    by_seed: dict[int, str] = field(default_factory=dict)


class Host(Protocol):
    """Where all of this runs."""

    names: Names

    def note(self, who: str, what: str, *requests: str) -> None:
        """Something happened."""


@dataclass
class _Live:
    """A request that the engine was given."""

    name: str
    most_tokens: int
    starts_before: float
    num_tokens: int = 0


def require(condition: object, message: str) -> None:
    """
    Raises:
        IntegrityError: the condition does not hold.
    """
    if not condition:
        raise IntegrityError(message)


class ApiChecks:
    """Watches one api process's end of the way from the engine."""

    def __init__(self, name: str, client: EngineClient, window: int, host: Host) -> None:
        self._name = name
        self._client = client
        self._window = window
        self._host = host
        self._ended: set[int] = set()
        self._submit, self._deliver = client.submit, client._deliver
        client.submit = self.submit  # type: ignore[method-assign]
        client._deliver = self.deliver  # type: ignore[method-assign]

    def submit(self, submission: Any, stream: Any) -> None:
        task = asyncio.current_task()
        self._host.names.by_seed[submission.sampling.seed] = task.get_name() if task else "?"
        self._submit(submission, stream)

    def deliver(self, outputs: ApiOutputs) -> None:
        ended = self._ended
        require(not ended.intersection(outputs.handles), "a token behind a request's end")
        for handle, _ in outputs.finished:
            require(handle not in ended, "a request ends twice")
            ended.add(handle)
        self._deliver(outputs)
        streams = self._client._streams
        for handle in outputs.handles:
            stream = streams.get(handle)
            limit = self._window + _UNREAD_SLACK
            require(stream is None or stream.patient or stream.unread <= limit, "a held stream grows on")


class EngineChecks:
    """Watches one engine."""

    def __init__(self, name: str, engine: EngineLoop, host: Host) -> None:
        self.num_turns = 0
        self._name = name
        self._host = host
        self._engine = engine
        self._cluster: Cluster = engine._cluster
        self._registry = engine._registry
        self._live: dict[int, _Live] = {}
        self._stock: Counter[str] = Counter()
        self._salts: dict[str, dict[int, bytes]] = {}  # by executor and block: whose content it has
        self._orphans: dict[int, _Live] = {}  # their api process is gone; until the end of the turn
        self._dispatch, self._receive = self._registry.dispatch, self._registry.receive
        self._submit, self._deliver, self._detach = engine._submit, engine._api.deliver, engine._api.detach
        self._registry.dispatch = self.dispatch  # type: ignore[method-assign]
        self._registry.receive = self.receive  # type: ignore[method-assign]
        self._lose = self._cluster.executor_lost
        self._cluster.executor_lost = self.lose  # type: ignore[method-assign]
        engine._submit = self.submit  # type: ignore[method-assign]
        engine._api.deliver = self.deliver  # type: ignore[method-assign]
        engine._api.detach = self.detach  # type: ignore[method-assign]

    # ---------------------------------------------------------------- what goes through the engine

    def submit(self, peer: Any, submit: Any, now: float) -> None:
        handle = peer.cluster_handle(submit.handle)
        require(handle not in self._live, "a handle is used twice")
        name = self._host.names.by_seed[submit.sampling.seed]
        starts_before = now + submit.queue_timeout if submit.queue_timeout else float("inf")
        self._live[handle] = _Live(name, submit.max_tokens - len(submit.output_token_ids), starts_before)
        self._host.note(self._name, f"is given {name} as {handle}", name)
        self._submit(peer, submit, now)

    def deliver(self, outputs: Outputs) -> None:
        for handle in outputs.handles.tolist():
            live = self._live.get(handle)
            if live is not None:
                live.num_tokens += 1
                require(live.num_tokens <= live.most_tokens, "more tokens than were asked for")
        for end in outputs.finished:
            live = self._live.pop(end.handle, None)
            require(live is not None or self._is_orphan(end.handle), "an end of nobody")
            if live is not None:
                message = f": {end.message}" if end.message else ""
                self._host.note(self._name, f"ends {live.name}: {end.reason.name}{message}", live.name)
        self._deliver(outputs)

    def detach(self, routing_id: bytes, reason: str) -> None:
        peer = self._engine._api._peers.get(routing_id)
        self._detach(routing_id, reason)
        for handle in peer.handles if peer is not None else ():
            if handle in self._live:
                self._orphans[handle] = self._live.pop(handle)

    def receive(self, routing_id: bytes, frame: bytes, now: float) -> list[Event]:
        events = self._receive(routing_id, frame, now)
        for event in events:
            if isinstance(event, StepFinished):
                header = execution_pb2.Envelope.FromString(frame)
                session = self._registry.sessions[event.executor_id]
                require(session.routing_id == routing_id, "a result of another process is taken")
                require((session.boot_id, session.epoch) == (header.boot_id, header.epoch), "a stale result is taken")
            elif isinstance(event, ExecutorJoined):
                self._salts[event.executor_id] = {}
        return events

    def dispatch(self, executor_id: str, plan: StepPlan, now: float) -> None:
        scheduler = self._cluster.executors[executor_id]
        require(len(scheduler.ledger) <= min(scheduler.run_ahead.depth, MAX_RUN_AHEAD), "too many plans in flight")
        require(plan.step_id == self._registry.sessions[executor_id].dispatched + 1, "a step is left out")
        admitted = {one.row: one for one in plan.admissions}
        salts = self._salts[executor_id]
        slot, block_size, suspects, names = 0, scheduler.capacity.block_size, 0, []
        columns = zip(plan.rows.tolist(), plan.num_tokens.tolist(), plan.start_positions.tolist(), strict=True)
        for row, count, start in columns:
            request = scheduler.rows.requests[row]
            live = None if request is None else self._live.get(request.handle, self._orphans.get(request.handle))
            require(live is not None, "a plan for an ended request")
            assert request is not None and live is not None
            require(not request.is_held, "a plan for a held request")
            require(request.started_at is not None, "a plan for a request that has not started")
            require((request.started_at or 0.0) < live.starts_before, "a request starts when it should have ended")
            suspects += request.is_quarantined
            if row in admitted and start:
                hit = admitted[row].block_ids[: start // block_size].tolist()
                require(all(salts.get(block) == request.salt for block in hit), "a prefix crosses tenants")
            for block in set((plan.slot_mapping[slot : slot + count] // block_size).tolist()):
                salts[block] = request.salt
            slot += count
            names.append(live.name)
        if suspects:
            require(len(scheduler.requests_in_flight()) == 1, "a suspect runs with others")
        self._host.note(self._name, f"plans step {plan.step_id} for {executor_id}: {' '.join(names)}", *names)
        self._dispatch(executor_id, plan, now)

    def lose(self, executor_id: str, now: float, faulty_step: int | None = None) -> LossReport:
        self._keep(self._cluster.executors[executor_id])
        return self._lose(executor_id, now, faulty_step)

    def stock(self) -> Counter[str]:
        """What happened on its executors so far."""
        for scheduler in self._cluster.executors.values():
            self._keep(scheduler)
        return self._stock

    def _keep(self, scheduler: Scheduler) -> None:
        for name in _STATS:
            self._stock[name] += getattr(scheduler.stats, name)

    # ---------------------------------------------------------------- between turns

    def after_turn(self) -> None:
        """The cheap checks after every turn, and now and then the thorough ones."""
        self.num_turns += 1
        cluster = self._cluster
        known = cluster.num_requests + len(self._untold_ends())
        require(len(self._live) == known, "a request is lost, or lives on after its end")
        for executor_id, scheduler in cluster.executors.items():
            self._check_blocks(scheduler)
            require(scheduler.stats.audit_mismatches == 0, "an audit finds other tokens than were sent")
            require(len(self._registry.sessions[executor_id].unreceived) <= MAX_RUN_AHEAD, "plans pile up")
        if not self._orphans:  # they make room at the end of a turn, for the next one
            self._check_progress()
            self._check_front()
        self._orphans.clear()
        if self.num_turns % _FULL_CHECK_EVENTS == 0:
            self.check_fully()

    def check_fully(self) -> None:
        """Everything, from scratch."""
        check_cluster(self._cluster)
        known = {*self._cluster.handles(), *self._untold_ends()}
        require(set(self._live) == known, "the engine's requests are not those it was given")

    def check_idle(self) -> None:
        """Nobody wants anything any more."""
        self.check_fully()
        require(not self._live and not self._cluster.num_queued, "requests are left over")
        for scheduler in self._cluster.executors.values():
            require(scheduler.kv.pool.num_used == 0, "blocks are left over")
            require(not scheduler.num_running and not scheduler.num_waiting, "rows are left over")
            require(not scheduler.running.departed, "departed requests are left over")

    def _check_blocks(self, scheduler: Scheduler) -> None:
        pool = scheduler.kv.pool
        used = int(np.count_nonzero(pool.ref_count))
        require(used + pool.num_free + pool.num_evictable == pool.num_blocks, "blocks are lost, or free twice")

    def _check_progress(self) -> None:
        """Who can run runs: with nothing in flight, nobody may be waiting for anything but an executor."""
        for executor_id, scheduler in self._cluster.executors.items():
            if len(scheduler.ledger):
                continue
            running, backlog = scheduler.running, scheduler.backlog
            can_run = len(running.decoding) or running.prefilling or backlog.waiting.peek() or backlog.suspects.peek()
            require(not can_run, f"{executor_id} could run something, and nothing is planned")

    def _check_front(self) -> None:
        cluster = self._cluster
        request = cluster._front.peek()
        for executor_id, scheduler in cluster.executors.items():
            if cluster.state(executor_id) is not ExecutorState.SERVING:
                continue
            fits = request is not None and request.max_total_tokens <= scheduler.capacity.max_total_tokens
            is_kept = request is not None and fits and has_room(scheduler, request)
            require(not is_kept, f"a request waits in front of {executor_id}, which has room")
            waiting = len(scheduler.backlog.waiting)
            require(waiting <= _MAX_WAITING + scheduler.rows.max_rows, "an executor's queue grows on")

    def _untold_ends(self) -> list[int]:
        """Requests that have ended, of which the api processes will hear at the next delivery."""
        return [end.handle for part in self._engine._outputs for end in part.finished if end.handle in self._live]

    def _is_orphan(self, handle: int) -> bool:
        return handle >> 48 not in self._engine._api._routing_ids
