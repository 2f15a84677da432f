"""The engine over real ZeroMQ sockets, between a hand-driven api process and shadow executors."""

import random
import time
from dataclasses import replace

import pytest

from baton_protos import engine_pb2 as pb
from baton_protos.columns import INT64, pack
from scheduler_service.core import cluster
from scheduler_service.core.scheduler import ExecutorCapacity, Scheduler
from tests.engine.rig import CAPACITY, VOCAB, Api, Engine
from tests.fakes.shadow_executor import oracle
from tests.fakes.shadow_link import ShadowLink


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


def test_requests_of_a_stuck_executor_go_on(engine: Engine, api: Api) -> None:
    victim = ShadowLink(engine.executor_endpoint, "victim", CAPACITY, stuck_at=60)
    victim.start()
    api.wait(lambda: api.limits.ready_executors == 1)
    expected = submit_many(api, 60)
    api.wait(lambda: api.limits.ready_executors == 0)  # its heartbeats go on
    assert len(api.ends) < 60
    assert {one.reason: one.count for one in api.idle_status().executor_losses}["stuck"] == 1
    heir = ShadowLink(engine.executor_endpoint, "heir", CAPACITY)
    heir.start()
    api.wait(lambda: len(api.ends) == 60)
    assert api.outputs == expected
    for link in (victim, heir):
        link.stop()
        assert link.error is None


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


def test_an_executor_too_large_for_the_scheduler_is_refused(
    engine: Engine, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the system grants that much memory differs; so this one does not."""

    def allocate(capacity: ExecutorCapacity, run_ahead: int | None) -> Scheduler:
        if capacity.max_rows > CAPACITY.max_rows:
            raise MemoryError("Unable to allocate")
        return Scheduler(capacity, run_ahead)

    monkeypatch.setattr(cluster, "Scheduler", allocate)
    giant = ShadowLink(engine.executor_endpoint, "giant", replace(CAPACITY, max_rows=64))
    giant.start()
    giant.join(10)
    assert "64 rows" in str(giant.error)
    link = ShadowLink(engine.executor_endpoint, "e", CAPACITY)
    link.start()
    api.wait(lambda: api.limits.ready_executors == 1)
    link.stop()
