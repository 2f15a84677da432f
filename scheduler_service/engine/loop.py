"""The engine: the only loop, the only clock, the only sockets around the core."""

import gc
import logging
import time
from collections.abc import Callable

import numpy as np
import zmq

from scheduler_service.config import ProcessSpec
from scheduler_service.core.cluster import Cluster
from scheduler_service.core.inflight import ResultMismatchError
from scheduler_service.core.invariants import check_integrity
from scheduler_service.core.scheduler import FinishedRequest, Outputs, merge
from scheduler_service.engine import api_wire
from scheduler_service.engine.api_port import ApiPort, Peer
from scheduler_service.engine.executor_registry import (
    HEARTBEAT_INTERVAL,
    Event,
    ExecutorJoined,
    ExecutorLost,
    ExecutorRegistry,
    Loss,
    StepFinished,
)
from scheduler_service.engine.sockets import PeerUnreachableError, Router, receive_some, send
from scheduler_service.engine.status import cluster_status

logger = logging.getLogger(__name__)

_LIMITS_INTERVAL = 0.5  # seconds; also the api processes' proof that the engine lives


class EngineLoop:
    """Moves frames between api processes, the core and executors until it is told to stop."""

    def __init__(
        self, spec: ProcessSpec, api: Router, executors: Router, clock: Callable[[], float] = time.monotonic
    ) -> None:
        settings = spec.settings
        self._clock = clock
        self._scheduler_id = spec.scheduler_id
        self._queue_timeout = settings.queue_timeout
        self._checks_integrity = settings.check_integrity
        self._cluster = Cluster(
            settings.max_queued_requests, None if settings.run_ahead == "auto" else settings.run_ahead
        )
        self._registry = ExecutorRegistry(spec.scheduler_id, settings.lease)
        self._executor_socket = executors
        self._api = ApiPort(api)
        self._vocab_size = 0
        self._dtype = ""
        self._next_limits = 0.0
        self._stopping = False
        self._outputs: list[Outputs] = []
        self._was_idle = True
        self._poller = zmq.Poller()
        self._poller.register(api, zmq.POLLIN)
        self._poller.register(executors, zmq.POLLIN)

    def stop(self) -> None:
        """Leave the loop at its next turn; callable from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until ``stop``."""
        gc.collect()
        gc.freeze()
        while not self._stopping:
            self.turn(HEARTBEAT_INTERVAL)

    def turn(self, timeout: float) -> None:
        """Take in what arrives within ``timeout`` seconds, then do what follows from it."""
        self._poller.poll(round(timeout * 1e3))
        now = self._clock()
        for routing_id, frame in receive_some(self._executor_socket):
            self._handle(self._registry.receive(routing_id, frame, now), now)
        for routing_id, frame in self._api.receive():
            self._receive_from_api(routing_id, frame, now)
        self._handle(self._registry.tick(now), now)
        if now >= self._next_limits:
            self._next_limits = now + _LIMITS_INTERVAL
            self._finish(self._cluster.expire(now, self._queue_timeout))
            self._push_limits()
        self._dispatch(now)
        self._deliver()
        self._abort_orphans()
        self._check_when_idle()

    # -------------------------------------------------------------- executors

    def _handle(self, events: list[Event], now: float) -> None:
        for event in events:
            match event:
                case StepFinished():
                    self._settle(event, now)
                case ExecutorJoined():
                    self._join(event)
                case ExecutorLost():
                    requeued = self._cluster.executor_lost(event.executor_id, now)
                    logger.warning(
                        "lost %s: %s; %d requests go on elsewhere", event.executor_id, event.reason, requeued
                    )
                    self._push_limits()

    def _join(self, event: ExecutorJoined) -> None:
        capacity, hello = event.capacity, event.hello
        self._cluster.executor_ready(event.executor_id, capacity)
        self._vocab_size, self._dtype = capacity.vocab_size, hello.dtype
        logger.info(
            "%s is ready: %s, %s, %d blocks of %d tokens, %d rows",
            event.executor_id,
            hello.device,
            hello.dtype,
            capacity.num_blocks,
            capacity.block_size,
            capacity.max_rows,
        )
        self._push_limits()

    def _settle(self, event: StepFinished, now: float) -> None:
        try:
            outputs = self._cluster.settle(event.executor_id, event.result)
        except ResultMismatchError as error:
            self._handle(self._registry.lose(event.executor_id, Loss.RESULT, str(error)), now)
            return
        self._outputs.append(outputs)

    def _dispatch(self, now: float) -> None:
        """Send plans while there are credits and work, one per executor and round, then all frames."""
        busy = list(self._cluster.executors)
        while busy:
            busy = [executor_id for executor_id in busy if self._dispatch_one(executor_id)]
        while self._registry.outgoing:
            outgoing = self._registry.outgoing.popleft()
            try:
                send(self._executor_socket, outgoing.routing_id, outgoing.frame)
            except PeerUnreachableError:
                self._handle(self._registry.unreachable(outgoing.routing_id), now)

    def _dispatch_one(self, executor_id: str) -> bool:
        plan = self._cluster.schedule(executor_id)
        if plan is not None:
            self._registry.dispatch(executor_id, plan)
        return plan is not None

    # ---------------------------------------------------------- api processes

    def _receive_from_api(self, routing_id: bytes, frame: bytes, now: float) -> None:
        try:
            message = api_wire.decode(frame)
            self._serve(routing_id, message, frame, now)
        except api_wire.WireError as error:
            logger.error("a frame from %s cannot be used: %s", routing_id.decode(errors="replace"), error)

    def _serve(self, routing_id: bytes, message: api_wire.ToEngine, frame: bytes, now: float) -> None:
        if isinstance(message, api_wire.Attach):
            self._api.attach(routing_id)
            self._api.send(routing_id, self._limits_frame())
            return
        if isinstance(message, api_wire.StatusQuery):  # the launcher asks too, for metrics, and never attaches
            status = cluster_status(message.query_id, self._cluster, self._registry, now)
            self._api.send(routing_id, api_wire.encode_status(status))
            return
        peer = self._api.peer(routing_id)
        if peer is None:
            return  # it was given up; it will notice, and attach again
        match message:
            case api_wire.Submit():
                self._submit(peer, message, now)
            case api_wire.Abort():
                ends = [self._cluster.abort(peer.cluster_handle(handle)) for handle in message.handles]
                self._finish([end for end in ends if end is not None])
            case api_wire.ForwardAbort():
                self._api.broadcast(api_wire.encode_forward_abort(frame), but=routing_id)

    def _submit(self, peer: Peer, submit: api_wire.Submit, now: float) -> None:
        handle = peer.cluster_handle(submit.handle)
        end = self._cluster.add_request(
            handle, submit.prompt_token_ids, submit.max_tokens, submit.sampling, submit.stop_token_ids, now
        )
        peer.handles.add(handle)
        if end is not None:
            self._finish([end])

    def _finish(self, ends: list[FinishedRequest]) -> None:
        if ends:
            self._outputs.append(Outputs(np.zeros(0, np.int64), np.zeros(0, np.int32), ends))

    def _deliver(self) -> None:
        """Send what this turn has brought, after the plans: executors must not wait, callers may for a moment."""
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._api.deliver(merge(outputs))

    def _abort_orphans(self) -> None:
        """End the requests of api processes that are gone."""
        orphans, self._api.orphans = self._api.orphans, []
        for handle in orphans:
            self._cluster.abort(handle)

    def _limits_frame(self) -> bytes:
        return api_wire.encode_limits(
            api_wire.Limits(
                ready_executors=len(self._cluster.executors),
                max_total_tokens=self._cluster.max_total_tokens,
                vocab_size=self._vocab_size,
                model_fingerprint=self._registry.fingerprint,
                dtype=self._dtype,
                scheduler_id=self._scheduler_id,
            )
        )

    def _push_limits(self) -> None:
        self._api.broadcast(self._limits_frame())

    # -------------------------------------------------------------- integrity

    def _check_when_idle(self) -> None:
        """Check the bookkeeping when the last request has ended."""
        idle = self._cluster.num_requests == 0
        if self._checks_integrity and idle and not self._was_idle:
            for scheduler in self._cluster.executors.values():
                check_integrity(scheduler)
        self._was_idle = idle
