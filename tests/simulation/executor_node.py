"""An executor: the real session, choice of a scheduler and inbox around a shadow of the device."""

import random
from collections.abc import Callable
from typing import Any, Protocol

from executor_service.inbox import Inbox, NewEpoch, PlanArrival, Stop
from executor_service.link import routing_id
from executor_service.scheduler_choice import SchedulerChoice
from executor_service.session import EXIT_DRAINED, Session
from executor_service.step_plan import Fault, FaultCode, MalformedPlan, StepPlan, StepTimings
from executor_service.wire import Capacity, decode_census
from scheduler_service.core.scheduler import ExecutorCapacity
from tests.fakes.shadow_executor import ExecutorDiedError, ShadowExecutor
from tests.simulation.clock import VirtualLoop
from tests.simulation.network import Pipe, Quality, Router
from tests.simulation.shadow import shadow_plan, wire_result

_BROKEN_SECONDS = 0.5  # as in executor_service/link.py
_MAX_UNSETTLED, _MAX_OUTGOING, _MAX_INBOX = 64, 128, 66


class Host(Protocol):
    """Where executors run."""

    loop: VirtualLoop
    rng: random.Random
    executor_links: Quality

    def router(self, endpoint: str) -> Router | None:
        """The socket that listens there; None = nobody does."""

    def note(self, who: str, what: str, *requests: str) -> None:
        """Something happened."""

    def executor_ended(self, node: "ExecutorNode", why: str) -> None:
        """A process is gone."""


class Wire:
    """The connection of one executor process to one scheduler's socket: made anew when it breaks."""

    def __init__(self, host: Host, node: "ExecutorNode", endpoint: str) -> None:
        self.broken_at: float | None = None
        self._host = host
        self._node = node
        self._endpoint = endpoint
        self._router: Router | None = None
        self._up = self._down = self._pipe(lambda _: None)
        self._closed = False
        self._reconnect()

    @property
    def is_up(self) -> bool:
        return self._router is not None

    def send(self, frame: bytes) -> bool:
        if self._router is None:
            return False
        self._up.send(frame)
        return True

    def cut(self, survival: float, *, silently: bool = False) -> None:
        """The connection breaks, ``silently`` without the scheduler's noticing; it is made anew in a moment."""
        router, self._router = self._router, None
        if router is None:
            return
        self._up.cut(survival)
        self._down.cut(survival)
        if not silently:
            router.forget(self._node.identity)
        self.broken_at = self._host.loop.time()
        if not self._closed:
            self._host.loop.call_later(self._host.rng.uniform(0.05, 0.3), self._reconnect)
            self._node.wake()

    def hold(self, *, up: bool, down: bool) -> None:
        """A partition, possibly of one direction: frames wait."""
        if up:
            self._up.hold()
        if down:
            self._down.hold()

    def heal(self) -> None:
        self._up.heal()
        self._down.heal()

    def close(self, *, silently: bool) -> None:
        self._closed = True
        self.cut(0.3, silently=silently)

    def _pipe(self, deliver: Callable[[Any], object]) -> Pipe:
        return Pipe(self._host.loop, self._host.rng, self._host.executor_links, deliver)

    def _reconnect(self) -> None:
        if self._closed or self._router is not None:
            return
        router = self._host.router(self._endpoint)
        if router is None:
            self._host.loop.call_later(self._host.rng.uniform(0.1, 1.0), self._reconnect)
            return
        node, identity = self._node, self._node.identity
        self._router, self.broken_at = router, None
        self._up = self._pipe(lambda frame: router.deliver(identity, frame))
        self._down = self._pipe(lambda frame: node.receive(self._endpoint, frame))
        router.peers[identity] = self._down.send
        node.wake()


class ExecutorNode:
    """One process, from its start to its end."""

    def __init__(
        self, host: Host, name: str, capacity: ExecutorCapacity, endpoints: list[str], step_seconds: float
    ) -> None:
        self.name = name
        self.capacity = capacity
        self.boot_id = host.rng.getrandbits(63)
        self.identity = routing_id(name, self.boot_id)
        self.step_seconds = step_seconds
        self.is_alive = True
        self.stuck_until = 0.0
        self.fails_next = False
        self._host = host
        self._loop = host.loop
        self._inbox = Inbox()
        self._choice = SchedulerChoice(endpoints, self.boot_id)
        self.session = Session(_hello(name, capacity), self.boot_id, self._inbox, host.loop.time())
        self._shadow = ShadowExecutor(capacity)
        self._epoch = 0
        self._loop.num_events += 1
        self._is_busy = False
        self._idle_since = host.loop.time()
        self._frozen: list[Callable[[], object]] | None = None
        self._frames: list[tuple[str, bytes]] = []
        self._is_woken = False
        self._timer: Any = None
        self.wires = {endpoint: Wire(host, self, endpoint) for endpoint in endpoints}
        self.wake()

    @property
    def home(self) -> str | None:
        """The scheduler it talks to."""
        return self._choice.home

    @property
    def is_busy(self) -> bool:
        """Whether a step runs, or hangs."""
        return self._is_busy

    # ---------------------------------------------------------------- faults

    def kill(self, *, silently: bool = False) -> None:
        """SIGKILL; ``silently``: the machine, so that nobody hears of it."""
        if not self.is_alive:
            return
        self.is_alive = False
        if self._timer is not None:
            self._timer.cancel()
        for wire in self.wires.values():
            wire.close(silently=silently)

    def freeze(self) -> None:
        """SIGSTOP."""
        if self._frozen is None:
            self._frozen = []

    def thaw(self) -> None:
        """SIGCONT: what came meanwhile is looked at now."""
        waiting, self._frozen = self._frozen, None
        self.wake()
        for action in waiting or ():
            self._do(action)

    def thaw_if_frozen(self) -> None:
        """SIGCONT; nothing to a process that runs."""
        if self._frozen is not None:
            self.thaw()

    def drain(self) -> None:
        """SIGTERM."""
        self._do(self.session.drain)
        self.wake()

    # ---------------------------------------------------------------- IO thread

    def receive(self, endpoint: str, frame: bytes) -> None:
        if self.is_alive:
            self._frames.append((endpoint, frame))
            self.wake()

    def wake(self) -> None:
        """Look what there is to do, now."""
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._do, self._round)

    def _do(self, action: Callable[[], object]) -> None:
        if self._frozen is not None:
            self._frozen.append(action)
        elif self.is_alive:
            action()

    def _round(self) -> None:
        """One turn of the IO thread, as executor_service.link has it."""
        self._is_woken = False
        now, session, choice = self._loop.time(), self.session, self._choice
        was_connected = session.is_connected
        session.tick(now)
        frames, self._frames = self._frames, []
        for endpoint, frame in frames:
            census = decode_census(frame) if choice.awaits(endpoint) else None
            if census is not None:
                choice.receive(endpoint, census, now)
            elif endpoint == choice.home:
                session.receive(frame, now)
        self._choose(was_connected, now)
        self._flush()
        self._compute()
        self._check_bounds()
        self._set_timer(now)

    def _choose(self, was_connected: bool, now: float) -> None:
        session, choice = self.session, self._choice
        if session.is_connected and now >= self._home_given_up_at():
            session.lose(now, "its connection is gone")
        if session.is_seeking(now):
            if was_connected:
                choice.leave(now, session.take_redirect())
            choice.seek(now)
        elif session.is_connected and (starved := choice.look_around(now)) is not None:
            session.ask_to_move(starved)

    def _home_given_up_at(self) -> float:
        home = self.wires.get(self._choice.home or "")
        if home is None or home.broken_at is None or not self.session.is_connected:
            return float("inf")
        if self.session.is_leaving:
            return home.broken_at
        return home.broken_at + _BROKEN_SECONDS if len(self.wires) > 1 else float("inf")

    def _flush(self) -> None:
        probes, outgoing = self._choice.outgoing, self.session.outgoing
        while probes:
            endpoint, frame = probes.popleft()
            self.wires[endpoint].send(frame)
        home = self.wires.get(self._choice.home or "")
        while home is not None and outgoing and home.send(outgoing[0]):
            outgoing.popleft()

    def _set_timer(self, now: float) -> None:
        session = self.session
        looks = session.is_connected or session.is_seeking(now)
        deadlines = [session.deadline, self._home_given_up_at()]
        if looks:
            deadlines.append(self._choice.deadline)
        if self._timer is not None:
            self._timer.cancel()
        at = max(min(deadlines), now + 0.001)
        self._timer = self._loop.call_at(at, self.wake)

    def _check_bounds(self) -> None:
        assert len(self.session.outgoing) <= _MAX_OUTGOING, "frames pile up"
        assert len(self.session._unsettled) <= _MAX_UNSETTLED, "results pile up"
        assert len(self._inbox) <= _MAX_INBOX, "plans pile up"

    # ---------------------------------------------------------------- main thread

    def _compute(self) -> None:
        """What the main loop does until a step runs on the device."""
        while len(self._inbox) and not self._is_busy and self.is_alive:
            match self._inbox.take():
                case NewEpoch(epoch):
                    self._shadow = ShadowExecutor(self.capacity)
                    self._epoch = epoch
                    self.session.ready(epoch)
                    self._flush()
                case PlanArrival(epoch, plan, arrived_at):
                    if epoch == self._epoch:
                        self._launch(plan, arrived_at)
                case Stop(exit_code, message):
                    self._exit(exit_code, message)

    def _launch(self, plan: StepPlan | MalformedPlan, arrived_at: float) -> None:
        now = self._loop.time()
        if isinstance(plan, MalformedPlan) or self.fails_next:
            self._fault(plan.step_id)
            return
        starved = 0.0 if plan.after_idle else now - self._idle_since
        seconds = self.step_seconds * self._host.rng.uniform(0.5, 1.5) + 20e-6 * len(plan.slot_mapping)
        timings = StepTimings(
            queued_us=round((now - arrived_at) * 1e6),
            device_us=round(seconds * 1e6),
            starved_us=round(starved * 1e6),
            plans_queued=len(self._inbox),
        )
        self._is_busy = True
        begins_at = max(now, self.stuck_until)
        epoch = self._epoch
        self._loop.call_at(begins_at + seconds, self._do, lambda: self._complete(epoch, plan, timings))

    def _complete(self, epoch: int, plan: StepPlan, timings: StepTimings) -> None:
        if self._loop.time() < self.stuck_until:  # it got stuck while the step ran
            self._loop.call_at(self.stuck_until, self._do, lambda: self._complete(epoch, plan, timings))
            return
        self._loop.num_events += 1
        self._is_busy = False
        self._idle_since = self._loop.time()
        try:
            result = self._shadow.execute(shadow_plan(plan))
        except ExecutorDiedError:
            self._host.note(self.name, "dies of a poisonous request")
            self.kill()
            self._host.executor_ended(self, "poison")
            return
        self._host.note(self.name, f"has run step {plan.step_id} of epoch {epoch}")
        self.session.result(epoch, wire_result(result, timings), self._loop.time())
        self.wake()

    def _fault(self, step_id: int) -> None:
        self.fails_next = False
        self._host.note(self.name, f"step {step_id} fails")
        fault = Fault(step_id, FaultCode.DEVICE_ERROR, "the device fails as it was told to")
        self.session.fault(self._epoch, fault, self._loop.time())
        self._epoch = 0
        self.wake()

    def _exit(self, exit_code: int, message: str) -> None:
        assert exit_code == EXIT_DRAINED, message
        self._host.note(self.name, f"ends: {message}")
        self.kill()
        self._host.executor_ended(self, "drained")


def _hello(name: str, capacity: ExecutorCapacity) -> Capacity:
    return Capacity(
        executor_id=name,
        model="shadow",
        model_fingerprint="shadow",
        kernel_fingerprint="shadow",
        device="shadow",
        dtype="float32",
        vocab_size=capacity.vocab_size,
        max_model_len=capacity.max_model_len,
        block_size=capacity.block_size,
        num_blocks=capacity.num_blocks,
        max_rows=capacity.max_rows,
        max_batched_tokens=capacity.max_batched_tokens,
        features=("exact",),
    )
