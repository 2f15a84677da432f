"""Schedulers, executors and callers in one thread, under one seed, on a clock and a network of their own."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from baton.credentials import Credentials
from baton.endpoints import Endpoints
from baton_protos import generation_pb2 as pb
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.engine.api_wire import ExecutorAction
from scheduler_service.engine.executor_session import Loss
from tests.simulation.caller import Caller, Habits, random_request
from tests.simulation.calls import Call, Channel
from tests.simulation.checks import Names, require
from tests.simulation.clock import VirtualLoop
from tests.simulation.executor_node import ExecutorNode
from tests.simulation.faults import GENTLE, ROUGH, Fault
from tests.simulation.network import Quality, Router, VirtualZmq
from tests.simulation.scheduler_node import ApiProcess, SchedulerPod
from tests.simulation.shadow import POISON_TOP_K
from tests.simulation.text import VOCAB, Tokenizer

_CALM_SECONDS = 120.0  # within which everything ends once nothing goes wrong any more
_DRAIN_SECONDS = 1.5  # with steps of 50 ms, of which at most 8 are in flight
_MAX_MODEL_LEN = 64
_FULL_SECONDS = 0.02  # between two looks whether another caller may come


@dataclass(frozen=True)
class Entry:
    """Something that happened. ``requests`` are the names of those whom it concerns."""

    time: float
    who: str
    what: str
    requests: tuple[str, ...]


class World:
    """One run.

    Attributes:
        story: what happened, if it is to be told.
        outcomes: how requests ended, by kind.
        heals: whether faults stop in the end, and everything has to end well; else correctness alone counts.
        reached: how often runs came to the rare places.
    """

    def __init__(self, seed: int, loop: VirtualLoop, zmq: VirtualZmq, *, tells: bool) -> None:
        self.rng = rng = random.Random(seed)
        self.loop = loop
        self.zmq = zmq
        self.names = Names()
        self.tokenizer = Tokenizer()
        self.story: list[Entry] = []
        self.outcomes: Counter[str] = Counter()
        self.fault_counts: Counter[str] = Counter()
        self.reached: Counter[str] = Counter()
        self.executor_links = Quality()
        self.caller_links = Quality()
        self.pods: dict[str, SchedulerPod] = {}  # by endpoint
        self.executors: dict[str, ExecutorNode] = {}
        self.callers: list[Caller] = []
        self._tells = tells
        self._tasks: dict[Caller, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[None] = loop.create_future()
        loop.set_exception_handler(lambda _, context: self.fail(context.get("exception", AssertionError(context))))
        self._calls: list[Call] = []
        self._num_pods_started = 0
        self._numbers = itertools.count()
        self._is_calm = False
        self.is_poisonous = rng.random() < 0.15
        faults = GENTLE if self.is_poisonous else (*GENTLE, *ROUGH)
        self._faults: list[Fault] = [one for one in faults if rng.random() < 0.4]
        self.heals = rng.random() < 0.75
        self._fault_interval = rng.choice([0.05, 0.3, 1.0] if self.heals else [0.02, 0.1])
        self._arrival_interval = rng.choice([0.002, 0.01, 0.05])
        self._most_callers = rng.choice([4, 16, 40])
        self._has_slow_readers = rng.random() < 0.4
        self._has_leavers = rng.random() < 0.4
        self._has_long_answers = rng.random() < 0.25  # and few of them: executors have room for what runs on others
        self._settings: dict[str, Any] = {
            "run_ahead": rng.choice(["auto", "auto", 1, 2, 4, 8]),
            "lease": rng.choice([1.0, 2.0]),
            "max_queued_requests": rng.choice([8, 100, 1000]),
            "unread_window": rng.choice([4, 16, 4096]),
            "queue_timeout": rng.choice([1.0, 30.0]),
        }
        self._num_apis = rng.choice([1, 1, 2])
        self._slots = [f"scheduler-{i}" for i in range(rng.choice([1, 1, 2]))]
        self.least_blocks = 12
        self.specs = {f"executor-{i}": self._capacity() for i in range(rng.randint(len(self._slots), 3))}
        self._step_seconds = rng.choice([0.0005, 0.002, 0.01])
        if self._has_long_answers:
            self._most_callers = 8
            self.least_blocks = 32
            self.specs = {name: self._roomy(one) for name, one in self.specs.items()}

    # ---------------------------------------------------------------- what happens

    def note(self, who: str, what: str, *requests: str) -> None:
        if self._tells:
            self.story.append(Entry(self.loop.time(), who, what, requests))

    def fail(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def run(self, until: Callable[[], bool]) -> None:
        """Trouble until ``until`` says so, then calm, if this run heals: everything has to end well.

        Raises:
            AssertionError: something that must hold does not.
        """
        await self._guarded(self._run(until))

    async def _run(self, until: Callable[[], bool]) -> None:
        for slot in self._slots:
            self.start_pod(slot)
        for name in self.specs:
            self.start_executor(name)
        endpoints = Endpoints(self._slots, Credentials(), lambda target, _: Channel(self, target))
        next_fault = self.loop.time() + 0.5
        while not until():
            pause = self.rng.expovariate(1 / self._arrival_interval)
            if len(self._tasks) >= self._most_callers:  # nobody can come before somebody has left
                pause = max(pause, _FULL_SECONDS)
            if self._faults:
                pause = min(pause, max(1e-6, next_fault - self.loop.time()))
            await asyncio.sleep(pause)
            if len(self._tasks) < self._most_callers:
                self._call(endpoints, self._new_caller())
            if self._faults and self.loop.time() >= next_fault:
                next_fault = self.loop.time() + self.rng.expovariate(1 / self._fault_interval)
                fault = self.rng.choice(self._faults)
                self.fault_counts[fault.__name__] += 1
                self.loop.num_events += 1
                fault(self, self.rng)
        if self.heals:
            await self._come_to_rest(endpoints)
        for pod in self.pods.values():
            pod.checks.check_fully()
            self._take_stock(pod)

    async def _come_to_rest(self, endpoints: Endpoints) -> None:
        self.note("world", "calm from now on")
        self._is_calm = True
        self._make_calm()
        await self._until(lambda: not self._tasks, "requests do not end")
        await self._until(self._is_complete, "executors do not come back")
        late = [self._plain_caller() for _ in range(4)]
        for caller in late:
            self._call(endpoints, caller)
        await self._until(lambda: not self._tasks, "requests do not end in a healthy cluster")
        require(all(one.outcome == "finished" for one in late), f"in a healthy cluster: {[c.outcome for c in late]}")
        await self._until(self._is_at_rest, "executors do not come to rest")
        await self._check_drain(endpoints)
        await asyncio.sleep(3.0)  # longer than any resume window
        for pod in self.pods.values():
            pod.checks.check_idle()
            require(not any(api.intake.num_live for api in pod.apis), "an api process keeps requests")

    async def _check_drain(self, endpoints: Endpoints) -> None:
        """An executor that is told to leave does, soon where others can take what it has."""
        for node in self.executors.values():
            node.step_seconds = 0.05
        for _ in range(6):
            caller = self._plain_caller()
            del caller.request.token_ids.ids[10:]
            caller.request.stop.CopyFrom(pb.StopConditions(max_tokens=min(30, self._most_tokens() - 10)))
            self._call(endpoints, caller)
        await asyncio.sleep(0.4)
        node = self.rng.choice(list(self.executors.values()))
        homes = Counter(one.home for one in self.executors.values())
        self.note(node.name, "is told to leave")
        node.drain()
        seconds = _DRAIN_SECONDS if homes[node.home] > 1 else _CALM_SECONDS
        await self._until(lambda: not node.is_alive, "a drain does not end", seconds)
        await self._until(lambda: not self._tasks, "requests do not end after a drain")

    async def _until(self, condition: Callable[[], bool], message: str, seconds: float = _CALM_SECONDS) -> None:
        deadline = self.loop.time() + seconds
        while not condition():
            require(self.loop.time() < deadline, f"{message}: {' '.join(one.name for one in self._tasks)}")
            await asyncio.sleep(0.1)

    async def _guarded(self, work: Any) -> None:
        task = self.loop.create_task(work)
        await asyncio.wait([task, self._failure], return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            task.cancel()
            self._failure.result()
        task.result()

    # ---------------------------------------------------------------- schedulers

    def start_pod(self, slot: str) -> None:
        self._num_pods_started += 1
        pod = SchedulerPod(self, slot, f"{slot}.{self._num_pods_started}", self._settings, self._num_apis)
        self.pods[slot] = pod

    def kill_pod(self, pod: SchedulerPod) -> None:
        del self.pods[pod.slot]
        pod.kill()
        self._take_stock(pod)
        for node in self.executors.values():
            if node.is_alive:
                node.wires[pod.slot].cut(0.0)

    def _take_stock(self, pod: SchedulerPod) -> None:
        """What a scheduler has been through. Some reasons for losing executors need a fault of their own."""
        losses, faults = pod.engine._registry.losses, self.fault_counts
        require(not losses[Loss.RESULT], "an executor answered what cannot be")
        require(not losses[Loss.STUCK] or faults["hang_executor"], "an executor is called stuck that is not")
        require(not losses[Loss.FAULT] or faults["fail_step"], "an executor failed without a fault")
        self.reached += pod.checks.stock()
        self.reached.update({f"lost: {loss.value}": count for loss, count in losses.items()})
        self.reached.update({f"dropped: {reason}": count for reason, count in pod.engine._registry.dropped.items()})

    def some_pod(self, rng: random.Random) -> SchedulerPod | None:
        pods = list(self.pods.values())
        return rng.choice(pods) if pods else None

    def router(self, endpoint: str) -> Router | None:
        pod = self.pods.get(endpoint)
        return None if pod is None else pod.executors

    def server(self, target: str) -> ApiProcess | None:
        pod = self.pods.get(target)
        return None if pod is None else self.rng.choice(pod.apis)

    # ---------------------------------------------------------------- executors

    def start_executor(self, name: str) -> None:
        known = self.executors.get(name)
        if known is None or not known.is_alive:
            self.note(name, f"starts with {self.specs[name].num_blocks} blocks")
            self.executors[name] = ExecutorNode(self, name, self.specs[name], self._slots, self._step_seconds)

    def start_executor_later(self, name: str, seconds: float) -> None:
        self.loop.call_later(seconds, self.start_executor, name)

    def executor_ended(self, node: ExecutorNode, why: str) -> None:
        self.start_executor_later(node.name, self.rng.uniform(0.1, 2.0))

    def _capacity(self) -> ExecutorCapacity:
        rng = self.rng
        block_size = rng.choice([2, 4, 8])
        max_rows = rng.randint(1, 8)
        return ExecutorCapacity(
            block_size=block_size,
            num_blocks=rng.randint(12, 40) if rng.random() < 0.7 else 100,
            max_rows=max_rows,
            max_batched_tokens=rng.randint(max(8, max_rows), 40),
            max_model_len=_MAX_MODEL_LEN,
            vocab_size=VOCAB,
        )

    def _roomy(self, capacity: ExecutorCapacity) -> ExecutorCapacity:
        return replace(capacity, num_blocks=200, max_rows=8, max_batched_tokens=max(24, capacity.max_batched_tokens))

    # ---------------------------------------------------------------- calm

    def calm_network(self) -> None:
        self.executor_links.__dict__.update(vars(Quality()))

    def _make_calm(self) -> None:
        self.calm_network()
        for name in self.specs:
            node = self.executors[name]
            node.stuck_until, node.fails_next = 0.0, False
            if node.is_alive:
                node.step_seconds = self._step_seconds
                node.thaw_if_frozen()
                for wire in node.wires.values():
                    wire.heal()
            else:
                self.start_executor_later(name, 1.0)
        for slot in self._slots:
            if slot not in self.pods:
                self.loop.call_later(3.5, self._start_missing_pod, slot)
        for call in self.live_calls():
            call.heal()
        for caller in self.callers:
            caller.habits.pause = min(caller.habits.pause, 0.05)
        self.loop.call_later(5.0, self._resume_all)

    def _start_missing_pod(self, slot: str) -> None:
        if slot not in self.pods:
            self.start_pod(slot)

    def _resume_all(self) -> None:
        """The operator takes back what was ordered."""
        for pod in self.pods.values():
            for executor_id in list(pod.engine._cluster.executors):
                pod.command(executor_id, ExecutorAction.RESUME)

    def _is_complete(self) -> bool:
        """Every executor is back, and where it is needed."""
        serving = sum(pod.engine._cluster.num_serving for pod in self.pods.values())
        everybody = len(self.pods) == len(self._slots) and all(node.is_alive for node in self.executors.values())
        needed = all(pod.engine._cluster.num_serving for pod in self.pods.values())
        return everybody and serving == len(self.specs) and needed

    def _is_at_rest(self) -> bool:
        """Besides, no step runs: who hung when the trouble ended still does, and its scheduler may not know it yet."""
        return self._is_complete() and not any(node.is_busy for node in self.executors.values())

    # ---------------------------------------------------------------- callers

    def live_calls(self) -> list[Call]:
        self._calls = [call for call in self._calls if not call.has_ended]
        return self._calls

    def note_call(self, call: Call) -> None:
        self._calls.append(call)

    def _call(self, endpoints: Endpoints, caller: Caller) -> None:
        self.callers.append(caller)
        task = self.loop.create_task(caller.run(endpoints), name=caller.name)
        self._tasks[caller] = task
        task.add_done_callback(lambda done: self._ended(caller, done))

    def _ended(self, caller: Caller, task: asyncio.Task[None]) -> None:
        del self._tasks[caller]
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            error.add_note(f"request {caller.name}")
            self.fail(error)
            return
        self.outcomes[caller.outcome] += 1
        self.reached["interruptions"] += caller.interruptions
        if caller.outcome == "failed":
            is_fair = caller.is_poisonous or not self.is_poisonous
            if not is_fair:
                self.fail(AssertionError(f"request {caller.name} fails in place of a poisonous one"))

    def _most_tokens(self) -> int:
        """What every executor can hold, shrunken or not."""
        block_size = min(spec.block_size for spec in self.specs.values())
        return min(_MAX_MODEL_LEN, self.least_blocks * block_size + 1)

    def _plain_caller(self) -> Caller:
        name = f"r{next(self._numbers)}"
        request = random_request(self.rng, name, self._most_tokens())
        return Caller(self, name, request, Habits())

    def _new_caller(self) -> Caller:
        rng, caller = self.rng, self._plain_caller()
        request, habits = caller.request, caller.habits
        if self._has_long_answers:
            del request.token_ids.ids[4:]
            request.stop.max_tokens = self._most_tokens() - 4
        if self.is_poisonous and rng.random() < 0.05:
            request.sampling.top_k = POISON_TOP_K
            request.n = 1
        if rng.random() < 0.1:
            request.queue_timeout_ms = rng.choice([1, 100, 1000])
        if rng.random() < 0.05:
            request.stop.deadline_unix_ms = round((self.loop.time() + rng.uniform(0.0, 2.0)) * 1e3)
        if rng.random() < 0.3:
            request.resume_window_ms = rng.choice([100, 2000])
        if self._has_slow_readers and rng.random() < 0.3:
            habits.pause = rng.choice([0.01, 0.1, 8.0])
        if self._has_leavers and rng.random() < 0.2:
            habits.leaves_after = rng.randint(1, 10)
            habits.comes_back, habits.away = request.resume_window_ms > 0, rng.choice([0.0, 0.05, 3.0])
        return caller
