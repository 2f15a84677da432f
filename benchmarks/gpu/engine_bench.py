"""Whole decode steps against the memory roofline, and nano-vllm's workload through an executor's launcher."""

import gc
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from baton.checkpoints.random_weights import SHAPES
from benchmarks.gpu.driver import Driver, DriverOptions, Row, random_model
from benchmarks.gpu.records import Record
from executor_service.kv_cache import KVCache
from executor_service.memory import default_kv_bytes
from executor_service.step_output import StepOutput
from executor_service.step_plan import RowSampling

_LAUNCHED = 2  # steps on the device at a time, as in an executor
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class DecodeSize:
    """Rows that decode together, from this context on."""

    rows: int
    context: int
    steps: int  # of a round

    @property
    def longest(self) -> int:
        """Tokens of a row at the end of all rounds, the first of which warms up."""
        return self.context + (_ROUNDS + 1) * self.steps


def nano_workload() -> list[tuple[list[int], int]]:
    """bench.py of nano-vllm (bb823b3): 256 prompts and their numbers of output tokens."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))] for _ in range(256)]
    return [(prompt, draw.randint(100, 1024)) for prompt in prompts]


def bench_decode(
    shape: str, device: torch.device, sizes: list[DecodeSize], exact: bool, bytes_per_s: float | None
) -> Iterator[Record]:
    """Steady decoding, sampled, in graphs; the floor is reading all weights and all keys and values once."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(SHAPES[shape], device, dtype)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if not SHAPES[shape].tie_word_embeddings:
        weight_bytes -= model.embed_tokens.weight.nbytes  # a few rows of it are read
    most = max(size.rows for size in sizes)
    longest = max(size.longest for size in sizes)
    driver = Driver(model, DriverOptions(device, dtype, most, longest, longest, exact=exact))
    report = driver.capture()
    yield {
        "bench": "graph capture",
        "shape": shape,
        "exact": exact,
        "graphs": report.graphs,
        "seconds": report.seconds,
        "mib": report.memory / (1 << 20),
    }
    for size in sizes:
        rows = start_rows(driver, size)
        decode(driver, rows, size.steps)
        rounds = [decode(driver, rows, size.steps) for _ in range(_ROUNDS)]
        step, host = (statistics.median(times) for times in zip(*rounds, strict=True))
        context = size.context + size.steps + _ROUNDS * size.steps / 2  # of the steps that are timed
        kv_bytes = size.rows * context * KVCache.bytes_per_block(model.config, 1, dtype)
        record: Record = {
            "bench": "decode",
            "shape": shape,
            "exact": exact,
            "rows": size.rows,
            "context": int(context),
            "step_ms": step * 1e3,
            "host_ms": host * 1e3,
            "tokens_per_s": size.rows / step,
        }
        if bytes_per_s is not None:
            floor = (weight_bytes + kv_bytes) / bytes_per_s
            record |= {"floor_ms": floor * 1e3, "share_of_roofline": floor / step}
        yield record
        for row in rows:
            driver.release(row)
    del driver, model
    free(device)


def start_rows(driver: Driver, size: DecodeSize) -> list[Row]:
    """Rows with a context, prefilled one by one, and room for all steps."""
    rows = [
        driver.admit(
            [3 + i % 4000 for i in range(size.context)], size.longest - size.context, RowSampling(1.0, seed=number)
        )
        for number in range(size.rows)
    ]
    for row in rows:
        driver.launch([(row, size.context)]).wait()
    return rows


def decode(driver: Driver, rows: list[Row], steps: int) -> tuple[float, float]:
    """(seconds per step, seconds of the host to launch one). A step is launched while the one before it runs; where
    both take the same, the host is what they wait for. Plans are made before: a scheduler does that.
    """
    plans = [driver.plan([(row, 1) for row in rows]) for _ in range(steps)]
    launched: deque[StepOutput] = deque()
    launching = 0.0
    began = time.perf_counter()
    for plan in plans:
        before = time.perf_counter()
        launched.append(driver.launcher.launch(plan))
        launching += time.perf_counter() - before
        if len(launched) == _LAUNCHED:
            launched.popleft().wait()
    while launched:
        launched.popleft().wait()
    return (time.perf_counter() - began) / steps, launching / steps


def bench_nano(
    shape: str, device: torch.device, workload: list[tuple[list[int], int]], max_rows: int, max_tokens: int
) -> Iterator[Record]:
    """``nano_workload`` or a part of it, at temperature 0.6: prefills fill up what decodes leave of a step."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    longest = max(len(prompt) + count for prompt, count in workload)
    model = random_model(SHAPES[shape], device, dtype)
    options = DriverOptions(device, dtype, max_rows, max_tokens, longest)
    fitting = default_kv_bytes(device) // KVCache.bytes_per_block(model.config, options.block_size, dtype)
    if fitting < max_rows * -(-longest // options.block_size):
        options = replace(options, num_blocks=fitting)
    driver = Driver(model, options)
    driver.capture()
    _serve(driver, [([3] * min(max_tokens, longest - 2), 2)], max_tokens)
    began = time.perf_counter()
    steps = _serve(driver, workload, max_tokens)
    wall = time.perf_counter() - began
    out = sum(count for _, count in workload)
    yield {
        "bench": "nano-vllm workload",
        "shape": shape,
        "requests": len(workload),
        "prompt_tokens": sum(len(prompt) for prompt, _ in workload),
        "out_tokens": out,
        "steps": steps,
        "wall_s": wall,
        "out_tokens_per_s": out / wall,
    }
    del driver, model
    free(device)


def _serve(driver: Driver, workload: list[tuple[list[int], int]], max_tokens: int) -> int:
    """Run all requests to their ends, which are known beforehand; the number of steps."""
    waiting = deque(enumerate(workload))
    running: list[tuple[Row, int]] = []  # with the number of tokens at which it ends
    launched: deque[StepOutput] = deque()
    steps = 0
    while waiting or running:
        while waiting and len(running) < driver.options.max_rows:
            number, (prompt, count) = waiting[0]
            try:
                row = driver.admit(prompt, count, RowSampling(0.6, seed=number))
            except RuntimeError:
                break  # no blocks until somebody ends
            waiting.popleft()
            running.append((row, len(prompt) + count - 1))
        parts = [(row, 1) for row, _ in running if row.computed >= len(row.tokens)]
        budget = max_tokens - len(parts)
        for row, _ in running:
            chunk = min(len(row.tokens) - row.computed, budget)
            if chunk > 0:
                parts.append((row, chunk))
                budget -= chunk
        launched.append(driver.launch(parts))
        steps += 1
        if len(launched) == _LAUNCHED:
            launched.popleft().wait()
        for row, end in running:
            if row.computed >= end:
                driver.release(row)
        running = [(row, end) for row, end in running if row.computed < end]
    while launched:
        launched.popleft().wait()
    return steps


def free(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
