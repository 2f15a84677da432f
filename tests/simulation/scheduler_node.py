"""A scheduler's pod: the real engine loop with its core, and the real api processes, around virtual sockets."""

import asyncio
import random
from pathlib import Path
from typing import Any, Protocol

import grpc

from scheduler_service.api.checkpoint import Checkpoint
from scheduler_service.api.engine_client import EngineClient, EngineListener
from scheduler_service.api.holds import Holds
from scheduler_service.api.intake import Intake
from scheduler_service.api.metrics import RequestMetrics
from scheduler_service.api.records import RequestRecorder
from scheduler_service.api.servicer import GenerationServicer
from scheduler_service.config import ProcessSpec, SchedulerSettings
from scheduler_service.engine.api_wire import ExecutorAction
from scheduler_service.engine.executor_registry import HEARTBEAT_INTERVAL
from scheduler_service.engine.loop import EngineLoop
from tests.simulation.calls import Call
from tests.simulation.checks import ApiChecks, EngineChecks, Names
from tests.simulation.clock import VirtualLoop
from tests.simulation.network import Poller, Router, VirtualZmq, WaitingError
from tests.simulation.text import Tokenizer

_TURN_SECONDS = 100e-6
_SLOW_CLIENT_TIMEOUT = 5.0
_MAX_HELD = 3  # so few that requests displace one another
_METRICS = RequestMetrics()
_RECORDER = RequestRecorder(_METRICS, [])


class Host(Protocol):
    """Where schedulers run."""

    loop: VirtualLoop
    rng: random.Random
    zmq: VirtualZmq
    tokenizer: Tokenizer
    names: Names

    def note(self, who: str, what: str, *requests: str) -> None:
        """Something happened."""

    def fail(self, error: BaseException) -> None:
        """Something is wrong: end the run."""


class ApiProcess:
    """One api process, from its start to its end."""

    def __init__(self, host: Host, pod: "SchedulerPod", index: int) -> None:
        settings = pod.spec.settings
        self.name = f"{pod.name}/api-{index}"
        self._host = host
        self._calls: set[Call] = set()
        checkpoint = Checkpoint((), host.tokenizer.vocab_size, (), host.tokenizer, None)  # type: ignore[arg-type]
        self.engine = EngineClient(pod.spec.engine_endpoint, index, window=settings.unread_window)
        holds = Holds(_MAX_HELD, _METRICS.hold_ended)
        self.intake = Intake(checkpoint, "shadow", self.engine, 10_000, _RECORDER, None, holds)  # type: ignore[arg-type]
        self._servicer = GenerationServicer(self.intake, self.engine, checkpoint, "shadow", _SLOW_CLIENT_TIMEOUT)
        self.checks = ApiChecks(self.name, self.engine, settings.unread_window, host)
        self.engine.start(EngineListener(lambda limits: None, self.intake.abort_forwarded))
        self.engine.lost.add_done_callback(lambda _: pod.api_lost(self))

    def begin(self, call: Call, request: Any) -> None:
        call.handler = asyncio.get_running_loop().create_task(self._serve(call, request), name=request.request_id)
        self._calls.add(call)

    def abort(self, request: Any) -> None:
        self.intake.abort("", request.request_ids)

    def kill(self) -> None:
        """Every stream that it serves breaks; nothing is said to the engine."""
        self.engine.close()
        for call in list(self._calls):
            call.break_off()
            call.abandon()

    async def _serve(self, call: Call, request: Any) -> None:
        try:
            await self._servicer.GenerateStream(request, call.context)
            call.send((None,))
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._host.fail(error)
        finally:
            self._calls.discard(call)


class SchedulerPod:
    """One scheduler, from its start to its end."""

    def __init__(self, host: Host, slot: str, name: str, settings: dict[str, Any], num_apis: int) -> None:
        self.slot = slot
        self.name = name
        values = SchedulerSettings(model=Path("shadow"), **settings)
        self.spec = ProcessSpec(settings=values, scheduler_id=name, engine_endpoint=f"ipc://{name}")
        self.is_alive = True
        self._host = host
        self._api_router = Router(self.wake)
        self.executors = Router(self.wake)
        self._timer: Any = None
        self._due = False
        self._frozen_until = 0.0
        host.zmq.routers[self.spec.engine_endpoint] = self._api_router
        self.engine = EngineLoop(self.spec, self._api_router, self.executors, clock=host.loop.time)  # type: ignore[arg-type]
        self._poller: Poller = self.engine._poller  # type: ignore[assignment]
        self.checks = EngineChecks(name, self.engine, host)
        self.apis = [ApiProcess(host, self, index) for index in range(num_apis)]
        self.wake()

    def kill(self) -> None:
        """SIGKILL of everything in the pod."""
        self.is_alive = False
        if self._timer is not None:
            self._timer.cancel()
        for api in self.apis:
            api.kill()

    def restart_api(self, index: int) -> None:
        """An api process dies, and is started again."""
        self.apis[index].kill()
        self._api_router.forget(self.apis[index].engine.routing_id)
        self.apis[index] = ApiProcess(self._host, self, index)

    def api_lost(self, api: ApiProcess) -> None:
        """It has given the engine up, and its process ends."""
        if self.is_alive and api in self.apis:
            self.restart_api(self.apis.index(api))

    def freeze(self, seconds: float) -> None:
        """The engine does nothing for a while."""
        self._frozen_until = self._host.loop.time() + seconds

    def command(self, executor_id: str, action: ExecutorAction) -> None:
        """An operator's order."""
        self.engine._command(executor_id, action)
        self.wake()

    def wake(self) -> None:
        """Something has arrived."""
        if not self._due:
            self._due = True
            self._set_timer(_TURN_SECONDS)

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = self._host.loop
        self._timer = loop.call_at(max(loop.time() + seconds, self._frozen_until), self._turn)

    def _turn(self) -> None:
        if not self.is_alive:
            return
        self._due = False
        self._host.loop.num_events += 1
        self._poller.is_due = True
        try:
            self.engine.turn(HEARTBEAT_INTERVAL)
            self.checks.after_turn()
            while not self._due:
                self.engine.turn(HEARTBEAT_INTERVAL)
        except WaitingError as waiting:
            if not self._due:
                self._set_timer(max(1e-6, waiting.seconds))
        except Exception as error:
            self._host.fail(error)
