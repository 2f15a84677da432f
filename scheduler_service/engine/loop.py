"""The engine: the only loop, the only clock, the only sockets around the core."""

import gc
import logging
import math
import time
from collections.abc import Callable, Container

import zmq

from scheduler_service.config import ProcessSpec
from scheduler_service.core.cluster import Cluster
from scheduler_service.core.inflight import ResultMismatchError
from scheduler_service.core.invariants import check_integrity
from scheduler_service.core.outputs import FinishedRequest, Outputs, ends, merge
from scheduler_service.engine import api_wire
from scheduler_service.engine.api_port import ApiPort, Peer
from scheduler_service.engine.disconnects import DisconnectMonitor
from scheduler_service.engine.executor_registry import HEARTBEAT_INTERVAL, ExecutorRegistry
from scheduler_service.engine.executor_session import (
    Event,
    ExecutorJoined,
    ExecutorLeaving,
    ExecutorLost,
    Loss,
    Probed,
    StepFinished,
)
from scheduler_service.engine.sockets import PeerUnreachableError, Router, receive_some, send
from scheduler_service.engine.status import cluster_status

logger = logging.getLogger(__name__)

_LIMITS_INTERVAL = 0.5  # seconds; also the api processes' proof that the engine lives
# Seconds between outputs to api processes. Waking them costs more than a step's bookkeeping: with many executors their
# steps share a message; where steps are further apart than this, nothing is delayed.
_DELIVERY_INTERVAL = 0.001


class EngineLoop:
    """Moves frames between api processes, the core and executors until it is told to stop."""

    def __init__(
        self,
        spec: ProcessSpec,
        api: Router,
        executors: Router,
        clock: Callable[[], float] = time.monotonic,
        executor_keys: Container[str] | None = None,
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
        self._executor_keys = executor_keys
        self._api = ApiPort(api)
        self._vocab_size = 0
        self._dtype = ""
        self._next_limits = 0.0
        self._next_delivery = 0.0
        self._stopping = False
        self._outputs: list[Outputs] = []
        self._was_idle = True
        self._poller = zmq.Poller()
        self._poller.register(api, zmq.POLLIN)
        self._poller.register(executors, zmq.POLLIN)
        self._disconnects = DisconnectMonitor(executors)
        self._poller.register(self._disconnects.socket, zmq.POLLIN)

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
        wake_at = min(self._registry.next_tick, self._next_delivery) if self._outputs else self._registry.next_tick
        timeout = min(timeout, max(0.0, wake_at - self._clock()))
        readable = {socket for socket, _ in self._poller.poll(math.ceil(timeout * 1e3))}
        now = self._clock()
        if self._disconnects.socket in readable and self._disconnects.take():
            self._registry.suspect(now)
        if self._executor_socket in readable:
            for routing_id, frame in receive_some(self._executor_socket, self._executor_keys):
                self._handle(self._registry.receive(routing_id, frame, now), now)
        if self._api.socket in readable:
            for routing_id, frame in self._api.receive():
                self._receive_from_api(routing_id, frame, now)
        self._handle(self._registry.tick(now), now)
        self._finish(self._cluster.expire_unstarted(now))
        if now >= self._next_limits:
            self._next_limits = now + _LIMITS_INTERVAL
            self._finish(self._cluster.expire(now, self._queue_timeout))
            self._cluster.rebalance(now)
            self._push_limits()
        self._let_go(now)
        self._dispatch(now)
        self._deliver(now)
        self._abort_orphans()
        self._check_when_idle()

    # -------------------------------------------------------------- executors

    def _handle(self, events: list[Event], now: float) -> None:
        for event in events:
            match event:
                case StepFinished():
                    self._settle(event, now)
                case ExecutorJoined():
                    self._join(event, now)
                case ExecutorLost():
                    self._lose(event, now)
                case ExecutorLeaving():
                    logger.info("executor wants to leave", extra={"executor_id": event.executor_id})
                    self._cluster.drain_executor(event.executor_id)
                case Probed():
                    self._registry.send_census(event, self._cluster.num_queued)

    def _let_go(self, now: float) -> None:
        """Release the executors that were to be drained and hold nothing any more."""
        for executor_id in self._registry.leaving():
            if self._cluster.is_drained(executor_id):
                self._cluster.executor_lost(executor_id, now)
                self._registry.release(executor_id)
                logger.info("executor let go", extra={"executor_id": executor_id})
                self._push_limits()

    def _lose(self, event: ExecutorLost, now: float) -> None:
        report = self._cluster.executor_lost(event.executor_id, now, event.faulty_step)
        logger.warning(
            "executor lost, its requests go on elsewhere",
            extra={"executor_id": event.executor_id, "reason": event.reason, "requests": report.num_requeued},
        )
        for end in report.failed:
            logger.error("request given up", extra={"handle": end.handle, "reason": end.message})
        self._finish(report.failed)
        self._push_limits()

    def _join(self, event: ExecutorJoined, now: float) -> None:
        capacity, hello = event.capacity, event.hello
        try:
            self._cluster.executor_ready(event.executor_id, capacity, now)
        except MemoryError:
            reason = (
                f"{capacity.max_rows} rows of {capacity.max_model_len} tokens and {capacity.num_blocks} blocks are "
                "more than the scheduler has memory for"
            )
            self._registry.refuse(event.executor_id, reason)
            return
        self._vocab_size, self._dtype = capacity.vocab_size, hello.dtype
        logger.info(
            "executor ready",
            extra={
                "executor_id": event.executor_id,
                "device": hello.device,
                "dtype": hello.dtype,
                "num_blocks": capacity.num_blocks,
                "block_size": capacity.block_size,
                "max_rows": capacity.max_rows,
            },
        )
        self._push_limits()

    def _settle(self, event: StepFinished, now: float) -> None:
        try:
            outputs = self._cluster.settle(event.executor_id, event.result)
        except ResultMismatchError as error:
            self._handle(self._registry.lose(event.executor_id, Loss.RESULT, str(error)), now)
            return
        self._outputs.append(outputs)
        mismatches = len(event.result.audit_mismatch_rows)
        if mismatches:
            logger.error(
                "%s computed %d tokens that differ from what had been sent: streams that went on there are not exact",
                event.executor_id,
                mismatches,
            )

    def _dispatch(self, now: float) -> None:
        """Send plans while there are credits and work, then all frames."""
        self._plan(now)
        while self._registry.outgoing:
            outgoing = self._registry.outgoing.popleft()
            try:
                send(self._executor_socket, outgoing.routing_id, outgoing.frame)
            except PeerUnreachableError:
                self._handle(self._registry.unreachable(outgoing.routing_id), now)
                self._plan(now)  # what it was doing goes on elsewhere at once

    def _plan(self, now: float) -> None:
        """One plan per executor and round."""
        busy = self._cluster.take_due()
        while busy:
            busy = [executor_id for executor_id in busy if self._dispatch_one(executor_id, now)]
            busy += [executor_id for executor_id in self._cluster.take_due() if executor_id not in busy]

    def _dispatch_one(self, executor_id: str, now: float) -> bool:
        plan = self._cluster.schedule(executor_id, now)
        if plan is not None:
            self._registry.dispatch(executor_id, plan, now)
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
                aborted = [self._cluster.abort(peer.cluster_handle(handle)) for handle in message.handles]
                self._finish([end for end in aborted if end is not None])
            case api_wire.Hold():
                for handle in message.held:
                    self._cluster.hold(peer.cluster_handle(handle), True)
                for handle in message.released:
                    self._cluster.hold(peer.cluster_handle(handle), False)
            case api_wire.ForwardAbort():
                self._api.broadcast(api_wire.encode_forward_abort(frame), but=routing_id)
            case api_wire.ExecutorCommand():
                known = self._command(message.executor_id, message.action)
                self._api.send(routing_id, api_wire.encode_command_result(message.query_id, known))

    def _command(self, executor_id: str, action: api_wire.ExecutorAction) -> bool:
        """Carry out an operator's order; False if there is no such executor."""
        if executor_id not in self._cluster.executors:
            return False
        logger.info("operator's order", extra={"executor_id": executor_id, "action": action.name.lower()})
        match action:
            case api_wire.ExecutorAction.PAUSE:
                self._cluster.pause_executor(executor_id)
            case api_wire.ExecutorAction.RESUME:
                self._cluster.resume_executor(executor_id)
                self._registry.keep(executor_id)
            case api_wire.ExecutorAction.DRAIN:
                self._cluster.drain_executor(executor_id)
                self._registry.drain(executor_id)
        return True

    def _submit(self, peer: Peer, submit: api_wire.Submit, now: float) -> None:
        handle = peer.cluster_handle(submit.handle)
        end = self._cluster.add_request(
            handle,
            submit.prompt_token_ids,
            submit.max_tokens,
            submit.sampling,
            now,
            output_token_ids=submit.output_token_ids,
            cache_salt=submit.cache_salt,
            priority=submit.priority,
            queue_timeout=submit.queue_timeout,
        )
        peer.handles.add(handle)
        if end is not None:
            self._finish([end])

    def _finish(self, finished: list[FinishedRequest]) -> None:
        if finished:
            self._outputs.append(ends(finished))

    def _deliver(self, now: float) -> None:
        """Send what has become known, after the plans: executors must not wait, callers may for a moment."""
        if self._outputs and now >= self._next_delivery:
            self._next_delivery = now + _DELIVERY_INTERVAL
            outputs, self._outputs = self._outputs, []
            self._api.deliver(merge(outputs))

    def _abort_orphans(self) -> None:
        """End the requests of api processes that are gone."""
        orphans, self._api.orphans = self._api.orphans, []
        for handle in orphans:
            self._cluster.abort(handle)

    def _limits_frame(self) -> bytes:
        return api_wire.encode_limits(
            api_wire.Limits(
                ready_executors=self._cluster.num_serving,
                max_total_tokens=self._cluster.max_total_tokens,
                vocab_size=self._vocab_size,
                model_fingerprint=self._registry.fingerprint,
                dtype=self._dtype,
                scheduler_id=self._scheduler_id,
                max_rows=sum(one.capacity.max_rows for one in self._cluster.executors.values()),
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
