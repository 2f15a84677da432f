"""What the engine's status says of queue and losses."""

import numpy as np

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.request import SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.engine.api_wire import Status
from scheduler_service.engine.executor_registry import ExecutorRegistry
from scheduler_service.engine.executor_session import Loss
from scheduler_service.engine.status import cluster_status

CAPACITY = ExecutorCapacity(
    block_size=4, num_blocks=64, max_rows=1, max_batched_tokens=64, max_model_len=128, vocab_size=500
)


class Engine:
    """The engine's state without its loop."""

    def __init__(self) -> None:
        self.cluster = Cluster(max_queued_requests=100)
        self.registry = ExecutorRegistry("s", lease=2.0)
        self.cluster.executor_ready("a", CAPACITY, 0.0)
        self.cluster.executor_lost("a", 0.0)

    def add(self, handle: int, now: float) -> None:
        prompt, greedy = np.ones(3, np.int32), SamplingParams()
        assert self.cluster.add_request(handle, prompt, 5, greedy, now) is None

    def status(self, now: float) -> Status:
        return cluster_status(1, self.cluster, self.registry, now)


def test_the_oldest_queued_request() -> None:
    engine = Engine()
    assert engine.status(5.0).oldest_queued_us == 0
    engine.add(1, 10.0)
    engine.add(2, 11.0)
    assert engine.status(12.5).oldest_queued_us == 2_500_000
    engine.cluster.abort(1)
    assert engine.status(12.5).oldest_queued_us == 1_500_000
    engine.cluster.abort(2)
    assert engine.status(12.5).oldest_queued_us == 0


def test_a_request_that_comes_back_waits_anew() -> None:
    engine = Engine()
    engine.add(1, 10.0)
    engine.cluster.executor_ready("b", CAPACITY, 10.0)
    assert engine.cluster.schedule("b", 12.0) is not None
    assert engine.cluster.oldest_queued_at is None
    engine.add(2, 12.0)
    assert engine.cluster.executor_lost("b", 20.0).num_requeued == 1
    assert engine.status(21.0).oldest_queued_us == 9_000_000
    engine.cluster.abort(2)
    assert engine.status(21.0).oldest_queued_us == 1_000_000


def test_every_kind_of_loss_is_counted_from_zero() -> None:
    engine = Engine()
    engine.registry.losses[Loss.LEASE] += 2
    assert engine.status(0.0).executor_losses == {
        "lease": 2, "connection": 0, "restart": 0, "stuck": 0, "fault": 0, "result": 0,
    }  # fmt: skip


def test_a_frame_that_does_not_decode_is_counted_under_one_name() -> None:
    engine = Engine()
    for garbage in (b"\xff", b"\xff\xff", b"what is this"):
        assert engine.registry.receive(b"x", garbage, 0.0) == []
    assert engine.status(0.0).dropped_frames == {"malformed frame": 3}
