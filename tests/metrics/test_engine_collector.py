"""The engine's status as metrics, without an engine."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from scheduler_service.engine.api_wire import ExecutorStatus, Status, encode_status
from scheduler_service.metrics.engine_collector import EngineCollector
from scheduler_service.metrics.engine_probe import EngineProbe
from scheduler_service.metrics.wire import decode_status
from tests.metrics.scrape import Samples, collected


def executor(name: str, **values: int) -> ExecutorStatus:
    numbers = dict.fromkeys(ExecutorStatus.__slots__, 0) | {"total_blocks": 10, "free_blocks": 10, "block_size": 16}
    return ExecutorStatus(**{**numbers, "executor_id": name, "device": "cpu", **values})  # type: ignore[arg-type]


def samples(status: Status | None) -> Samples:
    return collected(EngineCollector(lambda: status, "tiny"))


def test_without_an_answer_no_number_is_made_up() -> None:
    silent = samples(None)
    assert list(silent.families) == ["baton_engine_up"]
    assert silent.value("baton_engine_up") == 0


def test_without_an_executor_nothing_is_free() -> None:
    empty = samples(Status(0, 3, []))
    assert empty.value("baton_executors_ready") == 0
    assert empty.value("vllm:num_requests_waiting", model_name="tiny") == 3
    assert empty.value("vllm:kv_cache_usage_perc") == 1
    assert empty.labels("vllm:cache_config_info") == []


def test_aliases_are_sums_over_executors() -> None:
    one = executor("a", running_requests=2, waiting_requests=1, used_blocks=5, cached_blocks=3, free_blocks=2)
    other = executor("b", running_requests=4, total_blocks=30, used_blocks=5, free_blocks=25, block_size=32)
    both = samples(Status(0, 7, [one, other]))
    assert both.value("vllm:num_requests_waiting") == 7 + 1
    assert both.value("vllm:num_requests_running") == both.sum("baton_requests_running") == 6
    assert both.value("vllm:kv_cache_usage_perc") == 10 / 40
    assert both.value("baton_kv_cache_usage_ratio", executor="a") == 0.5
    assert both.value("baton_kv_blocks", executor="a", state="cached") == 3
    assert both.labels("vllm:cache_config_info") == [{"block_size": "16", "num_gpu_blocks": str(10 + 60)}]


def test_times_are_seconds_and_every_family_says_what_it_is() -> None:
    status = Status(0, 1, [executor("a", device_us=2_500_000, starved_us=1000)], 1_500_000, {"lease": 2}, {"odd": 4})
    found = samples(status)
    assert found.value("baton_device_seconds_total", executor="a") == 2.5
    assert found.value("baton_starved_seconds_total", executor="a") == 0.001
    assert found.value("baton_oldest_queued_request_seconds") == 1.5
    assert found.value("baton_executor_losses_total", reason="lease") == 2
    assert found.value("baton_dropped_frames_total", reason="odd") == 4
    assert all(family.documentation and family.type in ("gauge", "counter") for family in found.families.values())


def test_status_on_the_wire() -> None:
    status = Status(0, 5, [executor("a", epoch=3, stale_tokens=9)], 77, {"lease": 2}, {"foreign frame": 4})
    assert decode_status(encode_status(status)) == status


class FakeEngine:
    """Answers status queries while ``answers``; counts them."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.answers = True
        self.asked = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.bind(self.endpoint)
            while not self._stopping:
                if socket.poll(20):
                    routing_id, _ = socket.recv_multipart()
                    self.asked += 1
                    if self.answers:
                        socket.send_multipart((routing_id, encode_status(Status(0, self.asked, []))))

    def stop(self) -> None:
        self._stopping = True
        self._thread.join()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(f"ipc://{tmp_path / 'engine'}")
    yield fake
    fake.stop()


def test_scrapes_that_come_fast_share_an_answer(engine: FakeEngine) -> None:
    probe = EngineProbe(engine.endpoint)
    first = [probe.ask() for _ in range(10)]
    assert [status.queued_requests for status in first if status] == [1] * 10
    time.sleep(0.6)
    assert (later := probe.ask()) is not None
    assert (later.queued_requests, engine.asked) == (2, 2)
    probe.close()
    assert probe.ask() == later


def test_an_engine_that_does_not_answer_holds_nobody_up(engine: FakeEngine) -> None:
    engine.answers = False
    probe = EngineProbe(engine.endpoint)
    began = time.monotonic()
    assert probe.ask() is None
    assert probe.ask() is None
    assert time.monotonic() - began < 5
    probe.close()
