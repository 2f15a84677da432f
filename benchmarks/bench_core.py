"""Cost of scheduling: microseconds per step with every request decoding one token, and of the wire.

Per step: schedule (slots, block tables, table hashes, the plan's columns), settle (token log, stop ids). Block size 16,
prefix cache on, run-ahead 2, prompts of 64 to 79 tokens so that each step fills one block in sixteen rows, as in a
running service. Per end of a request, on top: its row and blocks are released, what it has generated is hashed and
published.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import numpy as np

from baton_protos import execution_pb2
from benchmarks.environment import environment
from benchmarks.figures import emit, run_main
from scheduler_service.core.cluster import Cluster
from scheduler_service.core.outputs import Outputs
from scheduler_service.core.request import SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import SAMPLE, StepPlan, StepResult
from scheduler_service.engine.api_wire import encode_outputs
from scheduler_service.engine.executor_wire import Header, decode, encode

BLOCK_SIZE = 16
VOCAB_SIZE = 10_000
EXECUTOR = "executor-0"


class Decoding:
    """A cluster in which ``running`` requests decode, with made-up results."""

    def __init__(self, running: int, steps: int) -> None:
        self.rng = np.random.default_rng(running)
        self.cluster = Cluster(running, run_ahead=2)
        max_tokens = steps + 64
        capacity = ExecutorCapacity(
            block_size=BLOCK_SIZE,
            num_blocks=running * ((80 + max_tokens) // BLOCK_SIZE + 2) + 1024,
            max_rows=running,
            max_batched_tokens=running * 80,
            max_model_len=4096,
            vocab_size=VOCAB_SIZE,
        )
        self.cluster.executor_ready(EXECUTOR, capacity, 0.0)
        for handle in range(running):
            prompt = self.rng.integers(3, VOCAB_SIZE, 64 + handle % BLOCK_SIZE).astype(np.int32)
            sampling = SamplingParams(seed=handle, stop_token_ids=(2,))
            assert self.cluster.add_request(handle, prompt, max_tokens, sampling, 0.0) is None
        scheduler = self.cluster.executors[EXECUTOR]
        while scheduler.num_running < running or len(self.last_plan.rows) < running:
            self.last_plan = self._schedule()
            self.settle(self.result(self.last_plan))
        self.in_flight = self._schedule()

    last_plan: StepPlan

    def _schedule(self) -> StepPlan:
        plan = self.cluster.schedule(EXECUTOR, 0.0)
        assert plan is not None
        return plan

    def result(self, plan: StepPlan) -> StepResult:
        samples = int(np.count_nonzero(plan.flags & SAMPLE))
        return StepResult(plan.step_id, self.rng.integers(3, VOCAB_SIZE, samples).astype(np.int32))

    def settle(self, result: StepResult) -> Outputs:
        return self.cluster.settle(EXECUTOR, result)

    def timed_step(self) -> float:
        """Microseconds of one schedule and one settle, with one step in flight between them."""
        result = self.result(self.in_flight)
        begin = time.perf_counter_ns()
        plan = self._schedule()
        outputs = self.settle(result)
        end = time.perf_counter_ns()
        assert len(outputs.handles) == len(plan.rows)
        self.in_flight = plan
        return (end - begin) / 1e3

    def timed_end(self, handle: int) -> float:
        """Microseconds of ending one request."""
        begin = time.perf_counter_ns()
        self.cluster.abort(handle)
        return (time.perf_counter_ns() - begin) / 1e3


def bench_core(running: int, steps: int, repeats: int) -> dict[str, object]:
    """Median over repeats of the median step; p99 over all steps."""
    times: list[list[float]] = []
    ends: list[float] = []
    for _ in range(repeats):
        decoding = Decoding(running, steps)
        gc.collect()
        gc.freeze()
        times.append([decoding.timed_step() for _ in range(steps)])
        ends += [decoding.timed_end(handle) for handle in range(running)]
        gc.unfreeze()
    figures = {**_summary(times), "us_per_end": round(statistics.median(ends), 1)}
    return {"bench": "core", "running": running, **figures, "steps": steps, "repeats": repeats}


def bench_wire(running: int, steps: int) -> dict[str, object]:
    """Encode a plan and an output batch, decode a result: what the wire adds to a step."""
    decoding = Decoding(running, steps)
    header = Header("scheduler", 1, 1, 1, 1)
    plan = decoding.in_flight
    result = decoding.result(plan)
    frame = _result_frame(result)
    outputs = decoding.settle(result)
    parts: dict[str, Callable[[], object]] = {
        "encode_plan_us": lambda: encode(header, plan),
        "decode_result_us": lambda: decode(frame),
        "encode_outputs_us": lambda: encode_outputs(outputs),
    }
    figures = {name: _median_us(call, steps) for name, call in parts.items()}
    return {
        "bench": "wire",
        "running": running,
        "us_per_step": round(sum(figures.values()), 1),
        **figures,
        "plan_bytes": len(encode(header, plan)),
    }


def _result_frame(result: StepResult) -> bytes:
    body = execution_pb2.StepResult(step_id=result.step_id, token_ids=result.token_ids.tobytes())
    return execution_pb2.Envelope(version=1, result=body).SerializeToString()


def _median_us(call: Callable[[], object], count: int) -> float:
    samples = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) / 1e3)
    return round(statistics.median(samples), 2)


def _summary(times: list[list[float]]) -> dict[str, float]:
    ordered = sorted(value for repeat in times for value in repeat)
    return {
        "us_per_step": round(statistics.median(statistics.median(repeat) for repeat in times), 1),
        "mean_us": round(statistics.fmean(ordered), 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)], 1),
    }


def main() -> None:
    """Print one JSON line per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256, 1024], help="requests that decode")
    parser.add_argument("--steps", type=int, default=256, help="timed steps per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    emit(**environment("numpy", "protobuf"))
    for running in args.running:
        emit(**bench_core(running, args.steps, args.repeats))
    for running in args.running:
        emit(**bench_wire(running, args.steps))


if __name__ == "__main__":
    run_main(main)
