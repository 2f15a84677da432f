"""Real processes: what the endpoints say before, during and after requests. The tests build on each other."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.multiprocess import MultiProcessCollector

from baton import Client, Completion, FinishReason, InvalidRequestError, LocalCluster
from baton.checkpoints.random_weights import SHAPES, write_random_checkpoint
from executor_service.config import ConfigError
from executor_service.metrics import ExecutorMetrics, serve_metrics
from tests.e2e.harness import descendants, eventually, options
from tests.metrics.scrape import Samples, scrape

BLOCKS = 300
MAX_ROWS = 2
SECONDS = 15.0
SHARED_SECONDS = 0.6  # a little more than scrapes share an answer of the engine
OUTCOMES = ("stop", "length", "abort", "cancelled", "invalid", "overloaded", "unavailable", "error")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Asked:
    """What the tests have asked for so far, and how it ended."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    length: int = 0
    stop: int = 0
    abort: int = 0
    cancelled: int = 0
    invalid: int = 0

    def add(self, completion: Completion) -> None:
        usage = completion.usage
        self.prompt_tokens += usage.prompt_tokens
        self.generated_tokens += usage.completion_tokens
        self.length += completion.finish_reason is FinishReason.LENGTH
        self.stop += completion.finish_reason is FinishReason.STOP
        self.abort += completion.finish_reason is FinishReason.ABORT


@dataclass
class Setting:
    cluster: LocalCluster
    model: Path
    scheduler_port: int
    executor_port: int
    directory: Path
    asked: Asked

    def scheduler(self) -> Samples:
        return scrape(self.scheduler_port)

    def executor(self) -> Samples:
        return scrape(self.executor_port)

    def await_scheduler(self, check: Callable[[Samples], bool]) -> Samples:
        """The first scrape that passes."""
        seen: list[Samples] = []

        def passes() -> bool:
            seen.append(self.scheduler())
            return check(seen[-1])

        assert eventually(passes, SECONDS)
        return seen[-1]

    def served_by(self, index: int) -> float:
        """Requests that one api process has seen end with their length."""
        (file,) = self.directory.glob(f"baton-*/counter_{index}.db")
        families = MultiProcessCollector.merge([str(file)])  # type: ignore[no-untyped-call]
        samples = [sample for family in families for sample in family.samples]
        return sum(sample.value for sample in samples if sample.labels == {"outcome": "length"})

    def await_idle(self) -> Samples:
        """A scrape at rest, which must agree with what was asked for."""
        time.sleep(SHARED_SECONDS)  # whatever the engine has said before is forgotten
        asked = self.asked
        ended = sum(getattr(asked, name, 0) for name in OUTCOMES)
        found = self.await_scheduler(
            lambda s: (
                s.sum("baton_requests_total") == ended
                and s.sum("baton_requests_running") == 0 == s.sum("baton_inflight_steps")
            )
        )
        assert {name: found.value("baton_requests_total", outcome=name) for name in OUTCOMES} == {
            name: getattr(asked, name, 0) for name in OUTCOMES
        }
        assert found.value("baton_request_seconds_count") == asked.length + asked.stop
        assert found.value("baton_prompt_tokens_total") == asked.prompt_tokens
        assert found.value("vllm:num_requests_running") == found.value("vllm:num_requests_waiting") == 0
        assert found.value("vllm:kv_cache_usage_perc") == 0
        return found


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    model = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(SHAPES["qwen3-tiny"], model, dtype="float32", seed=1)
    scheduler_port, executor_port = free_port(), free_port()
    # The scheduler's own directory must be found below; its path must stay short enough for a socket.
    with tempfile.TemporaryDirectory(prefix="m-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", directory)
        running = LocalCluster(
            options(
                model,
                num_blocks=BLOCKS,
                api_processes=2,
                scheduler_arguments=("--metrics-port", str(scheduler_port), "--served-model-name", "tiny"),
                executor_arguments=("--metrics-port", str(executor_port), "--max-rows", str(MAX_ROWS)),
            )
        )
        with running:
            yield Setting(running, model, scheduler_port, executor_port, Path(directory), Asked())


@pytest.fixture
def client(setting: Setting) -> Iterator[Client]:
    with Client(setting.cluster.address) as connected:
        yield connected


def test_before_any_request(setting: Setting) -> None:
    found = setting.await_idle()
    assert found.value("baton_engine_up") == found.value("baton_executors_ready") == 1
    assert found.value("baton_steps_total", executor="executor-0") == 0
    assert found.value("baton_rows") == MAX_ROWS
    assert found.value("baton_kv_blocks", state="free") == BLOCKS
    assert found.labels("vllm:cache_config_info") == [{"block_size": "16", "num_gpu_blocks": str(BLOCKS)}]
    assert found.labels("vllm:num_requests_waiting") == [{"model_name": "tiny"}]
    assert found.sum("baton_executor_losses_total") == 0
    executor = setting.executor()
    assert executor.value("baton_executor_connected") == executor.value("baton_executor_sessions_total") == 1
    assert executor.value("baton_executor_steps_total") == 0
    assert executor.value("baton_executor_kv_blocks") == BLOCKS
    assert executor.value("baton_executor_peak_rss_bytes") >= executor.value("process_resident_memory_bytes")
    assert executor.labels("baton_executor_info")[0]["executor"] == "executor-0"


def test_the_scheduler_stays_free_of_torch(setting: Setting) -> None:
    for pid in descendants(setting.cluster.scheduler_pid):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_two_api_processes_add_up(setting: Setting) -> None:
    ends = []
    for number in range(16):  # a connection each: the kernel spreads them over the processes
        with Client(setting.cluster.address) as one:
            ends.append(one.generate([1 + number, 2, 3], max_tokens=4 + number, ignore_eos=True))
            ends.append(one.stream([1 + number, 5], max_tokens=3, ignore_eos=True).result())
    with Client(setting.cluster.address) as one:
        ends.append(one.generate([1, 2, 3], max_tokens=9, temperature=0.0, ignore_eos=True))
        stop = ends[-1].token_ids[3]
        ends.append(one.generate([1, 2, 3], max_tokens=9, temperature=0.0, stop_token_ids=[stop]))
    for end in ends:
        setting.asked.add(end)
    found = setting.await_idle()
    assert setting.asked.stop == 1
    assert found.value("baton_generated_tokens_total") == setting.asked.generated_tokens
    assert found.value("baton_time_to_first_token_seconds_count") == len(ends)
    assert 0 < found.value("baton_time_to_first_token_seconds_sum") < found.value("baton_request_seconds_sum")
    assert setting.served_by(0) > 0 < setting.served_by(1)
    assert setting.served_by(0) + setting.served_by(1) == setting.asked.length


def test_scheduler_and_executor_agree(setting: Setting) -> None:
    scheduler, executor = setting.await_idle(), setting.executor()
    steps = executor.value("baton_executor_steps_total")
    assert scheduler.value("baton_steps_total") == steps == executor.value("baton_executor_step_seconds_count")
    sampled = setting.asked.generated_tokens + scheduler.value("baton_stale_tokens_total")
    assert executor.value("baton_executor_sampled_tokens_total") == sampled
    reused = scheduler.value("baton_prefix_cache_hit_tokens_total")
    # Each request computes its prompt but for what is reused, and each token but its last; stale ones come on top.
    requests = setting.asked.length + setting.asked.stop
    computed = setting.asked.prompt_tokens + sampled - requests - reused
    assert executor.value("baton_executor_computed_tokens_total") == computed
    assert scheduler.value("baton_prefix_cache_query_tokens_total") == setting.asked.prompt_tokens
    assert scheduler.value("baton_device_seconds_total") == pytest.approx(
        executor.value("baton_executor_step_seconds_sum")
    )
    assert executor.sum("baton_executor_faults_total") == 0


def test_while_requests_run_and_wait(setting: Setting, client: Client) -> None:
    asked = setting.asked
    names = [f"long-{number}" for number in range(5)]
    streams = []
    for number, name in enumerate(names):
        streams.append(client.stream([3, number], max_tokens=1200, ignore_eos=True, request_id=name))
        if number < MAX_ROWS:
            next(streams[-1])
    found = setting.await_scheduler(lambda s: s.value("vllm:num_requests_waiting") == 3)
    assert found.value("vllm:num_requests_running") == found.sum("baton_requests_running") == MAX_ROWS
    assert found.value("baton_requests_queued") + found.sum("baton_requests_waiting") == 3
    assert 0 < found.value("vllm:kv_cache_usage_perc") == found.value("baton_kv_cache_usage_ratio") < 1
    assert found.sum("baton_kv_blocks") == BLOCKS
    used = found.value("baton_kv_blocks", state="used")
    assert used == pytest.approx(found.value("vllm:kv_cache_usage_perc") * BLOCKS)
    assert 1 <= found.value("baton_run_ahead_steps") <= 8
    streams[4].close()
    asked.cancelled += 1
    asked.prompt_tokens += 2
    client.abort(*names[:4])
    for stream in streams[:4]:
        asked.add(stream.result())
    assert asked.abort == 4
    with pytest.raises(InvalidRequestError):
        client.generate([1], max_tokens=10**6)
    asked.invalid += 1
    found = setting.await_idle()
    assert found.value("baton_generated_tokens_total") == asked.generated_tokens


def test_an_api_process_that_is_started_again_counts_on(setting: Setting) -> None:
    (victim,) = [
        pid
        for pid in descendants(setting.cluster.scheduler_pid)
        if "scheduler_service.api\0" in (line := Path(f"/proc/{pid}/cmdline").read_text()) and '"index":1' in line
    ]
    before = setting.served_by(1)
    os.kill(victim, signal.SIGKILL)

    def serves_again() -> bool:
        with Client(setting.cluster.address) as one:
            setting.asked.add(one.generate([9, 9], max_tokens=2, ignore_eos=True))
        return setting.served_by(1) > before

    assert eventually(serves_again, SECONDS)
    found = setting.await_scheduler(lambda s: s.value("baton_requests_total", outcome="length") == setting.asked.length)
    assert found.value("baton_generated_tokens_total") == setting.asked.generated_tokens
    assert len(list(setting.directory.glob("baton-*/*.db"))) == 2 * 2  # counters and histograms, no file per pid


def test_an_executor_that_is_lost(setting: Setting) -> None:
    (pid,) = setting.cluster.executor_pids().values()
    os.kill(pid, signal.SIGKILL)
    gone = setting.await_scheduler(lambda s: s.value("baton_executors_ready") == 0)
    assert gone.sum("baton_executor_losses_total") == 1
    assert gone.labels("baton_kv_blocks") == gone.labels("baton_requests_running") == []
    assert gone.value("vllm:kv_cache_usage_perc") == 1


def test_a_port_in_use_stops_a_scheduler(setting: Setting) -> None:
    flags = ["--model", str(setting.model), "--port", "0", "--executor-endpoint", "tcp://127.0.0.1:0"]
    command = [sys.executable, "-m", "scheduler_service", *flags, "--metrics-port", str(setting.scheduler_port)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    where = f"127.0.0.1:{setting.scheduler_port}"
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: cannot serve metrics on {where}: Address already in use\n"


def test_a_port_in_use_stops_an_executor(setting: Setting) -> None:
    with pytest.raises(ConfigError, match=r"--metrics-port: cannot listen on .*: Address already in use"):
        serve_metrics(ExecutorMetrics(), "127.0.0.1", setting.scheduler_port)
