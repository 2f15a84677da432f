"""The engine over real ZeroMQ sockets, between a hand-driven api process and shadow executors."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from baton_protos import engine_pb2 as pb
from baton_protos.columns import INT64, pack, unpack
from baton_protos.execution_pb2 import RowSampling
from scheduler_service.config import ProcessSpec, SchedulerSettings
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.engine.loop import EngineLoop
from scheduler_service.engine.sockets import bind_router, bound_endpoint
from tests.fakes.shadow_executor import oracle
from tests.fakes.shadow_link import ShadowLink

VOCAB = 500
CAPACITY = ExecutorCapacity(
    block_size=4, num_blocks=96, max_rows=16, max_batched_tokens=64, max_model_len=128, vocab_size=VOCAB
)


class Engine:
    """An engine loop on a thread of this process."""

    def __init__(self, directory: Path) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.api_endpoint = f"ipc://{directory / 'engine'}"
        api = bind_router(context, self.api_endpoint, 100_000)
        executors = bind_router(context, "tcp://127.0.0.1:0", 1000)
        self.executor_endpoint = bound_endpoint(executors)
        settings = SchedulerSettings(model=directory, check_integrity=True, lease=1.0)
        spec = ProcessSpec(settings=settings, scheduler_id="s", engine_endpoint=self.api_endpoint)
        self.loop = EngineLoop(spec, api, executors)
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self._context = context

    def _run(self) -> None:
        try:
            self.loop.run()
        except Exception as error:
            self.error = error

    def close(self) -> None:
        self.loop.stop()
        self.thread.join()
        self._context.destroy(linger=0)
        assert self.error is None


class Api:
    """What an api process says and hears."""

    def __init__(self, endpoint: str, name: bytes = b"api-0") -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, name)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.limits = pb.Limits()
        self.status: pb.Status | None = None
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, int] = {}
        self.send(attach=pb.Attach())

    def send(self, **body: object) -> None:
        self.socket.send(pb.ToEngine(**body).SerializeToString())

    def submit(self, handle: int, prompt: list[int], max_tokens: int, seed: int, stops: list[int]) -> None:
        self.outputs[handle] = []
        self.send(
            submit=pb.Submit(
                handle=handle,
                prompt_token_ids=pack(prompt),
                max_tokens=max_tokens,
                sampling=RowSampling(temperature=1.0, top_p=1.0, seed=seed, stop_token_ids=pack(stops)),
            )
        )

    def wait(self, condition: Callable[[], object], timeout: float = 60.0) -> None:
        """Take in frames until the condition holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            if self.socket.poll(50):
                self._receive(pb.FromEngine.FromString(self.socket.recv()))

    def _receive(self, message: pb.FromEngine) -> None:
        match message.WhichOneof("body"):
            case "limits":
                self.limits = message.limits
            case "status":
                self.status = message.status
            case "outputs":
                handles = unpack(message.outputs.handles, INT64).tolist()
                for handle, token in zip(handles, unpack(message.outputs.token_ids).tolist(), strict=True):
                    assert handle not in self.ends
                    self.outputs[handle].append(token)
                for end in message.outputs.finished:
                    assert end.handle not in self.ends
                    self.ends[end.handle] = end.outcome

    def idle_status(self) -> pb.Status:
        self.status = None
        self.send(status=pb.StatusQuery(query_id=1))
        self.wait(lambda: self.status)
        assert self.status is not None
        return self.status

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def api(engine: Engine) -> Iterator[Api]:
    api = Api(engine.api_endpoint)
    yield api
    api.close()


def submit_many(api: Api, count: int, seed: int = 0) -> dict[int, list[int]]:
    """Submit random requests; what each must answer."""
    rng = random.Random(seed)
    expected = {}
    for handle in range(count):
        prompt = [rng.randrange(5)] * 9 + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        max_tokens, noise, stops = rng.randint(1, 40), rng.randint(0, 3), rng.sample(range(VOCAB), 3)
        api.submit(handle, prompt, max_tokens, noise, stops)
        expected[handle] = oracle(prompt, max_tokens, noise, tuple(stops), VOCAB)
    return expected


def assert_nothing_in_use(api: Api) -> None:
    status = api.idle_status()
    assert status.queued_requests == 0
    for executor in status.executors:
        assert executor.running_requests == executor.waiting_requests == executor.used_blocks == 0


def test_streams_equal_the_oracle_on_two_executors(engine: Engine, api: Api) -> None:
    links = [ShadowLink(engine.executor_endpoint, f"e{i}", CAPACITY) for i in range(2)]
    for link in links:
        link.start()
    api.wait(lambda: api.limits.ready_executors == 2)
    expected = submit_many(api, 200)
    api.wait(lambda: len(api.ends) == 200)
    assert api.outputs == expected
    assert_nothing_in_use(api)
    for link in links:
        link.stop()
        assert link.error is None


def test_lost_frames_are_sent_again(engine: Engine, api: Api) -> None:
    link = ShadowLink(engine.executor_endpoint, "e", CAPACITY, loss=0.1)
    link.start()
    api.wait(lambda: api.limits.ready_executors == 1)
    expected = submit_many(api, 20)
    api.wait(lambda: len(api.ends) == 20, timeout=120)
    assert api.outputs == expected
    assert api.idle_status().executors[0].epoch == 1
    link.stop()
    assert link.error is None


def test_requests_of_a_vanished_executor_go_on(engine: Engine, api: Api) -> None:
    victim = ShadowLink(engine.executor_endpoint, "victim", CAPACITY, step_seconds=0.005)
    victim.start()
    api.wait(lambda: api.limits.ready_executors == 1)
    expected = submit_many(api, 60)
    api.wait(lambda: sum(map(len, api.outputs.values())) > 200)
    victim.stop()
    api.wait(lambda: api.limits.ready_executors == 0)
    heir = ShadowLink(engine.executor_endpoint, "heir", CAPACITY)
    heir.start()
    api.wait(lambda: len(api.ends) == 60)
    assert api.outputs == expected
    assert_nothing_in_use(api)
    heir.stop()


def test_an_abort_storm_leaves_nothing_behind(engine: Engine, api: Api) -> None:
    link = ShadowLink(engine.executor_endpoint, "e", CAPACITY)
    link.start()
    api.wait(lambda: api.limits.ready_executors == 1)
    rng = random.Random(1)
    for handle in range(10_000):
        api.submit(handle, [rng.randrange(VOCAB) for _ in range(8)], 100, 0, [])
        if handle >= 50:
            api.send(abort=pb.Abort(handles=pack([handle - 50], INT64)))
    api.send(abort=pb.Abort(handles=pack(list(range(10_000)), INT64)))
    api.wait(lambda: len(api.ends) == 10_000)
    assert set(api.ends.values()) <= {pb.OUTCOME_ABORT, pb.OUTCOME_LENGTH}
    assert_nothing_in_use(api)
    link.stop()
    assert link.error is None


def test_requests_of_a_vanished_api_process_end(engine: Engine, api: Api) -> None:
    link = ShadowLink(engine.executor_endpoint, "e", CAPACITY, step_seconds=0.002)
    link.start()
    other = Api(engine.api_endpoint, b"api-1")
    other.wait(lambda: other.limits.ready_executors == 1)
    submit_many(other, 100)
    other.wait(lambda: sum(map(len, other.outputs.values())) > 50)
    other.close()
    deadline = time.monotonic() + 10
    while any(e.running_requests for e in api.idle_status().executors) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert_nothing_in_use(api)
    link.stop()


def test_without_an_executor_nothing_is_promised(engine: Engine, api: Api) -> None:
    api.wait(lambda: api.limits.scheduler_id)
    api.submit(0, [1, 2], 4, 0, [])
    api.wait(lambda: api.ends)
    assert api.ends[0] == pb.OUTCOME_REJECTED


def test_garbage_from_an_api_process_is_harmless(engine: Engine, api: Api) -> None:
    for garbage in (b"\xff\xff", b"", pb.ToEngine(abort=pb.Abort(handles=b"123")).SerializeToString()):
        api.socket.send(garbage)
    api.submit(1 << 60, [1], 1, 0, [])
    assert api.idle_status().queued_requests == 0
