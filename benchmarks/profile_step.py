"""Where the microseconds of an executor's step go on CPU: kernels by kind, and what Python does between them.

Steps run as in an executor, from plan to result, but without sockets. Decodes have a context of 256 tokens. Each kind
stands beside its limit: its matrix products at the rate of the fastest one seen here, or its bytes at the speed of a
plain read, whichever takes longer. Figures are the least of many steps, since others may use the cores; a kind's least
need not come from the same step as another's.
"""

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.checkpoints import add_model_options, cached_checkpoint
from benchmarks.contenders import read
from benchmarks.environment import environment
from benchmarks.figures import emit, run_main
from benchmarks.machine import ForeignLoad, usable_cores
from benchmarks.stopwatch import STAGES, Stopwatch
from executor_service import startup
from executor_service.block_tables import BlockTables
from executor_service.config import ExecutorSettings
from executor_service.executor import StepLauncher
from executor_service.kv_cache import KVCache
from executor_service.layers.embedding import ParallelLMHead
from executor_service.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from executor_service.model_runner import ModelRunner
from executor_service.models.config import ModelConfig
from executor_service.models.decoder import CausalLM, DecoderLayer
from executor_service.step_plan import EXPLICIT, SAMPLE, Admission, Int32s, RowSampling, StepPlan
from kernels.linear import linear, pack
from kernels.native import library

CONTEXT = 256
BLOCK_SIZE = 16
_MAX_TOKENS = 2048
_SPARE_BLOCKS = 8  # of each row, for what it decodes


class Limits:
    """What the machine can do: the best of what was seen, so look often."""

    def __init__(self) -> None:
        self._memory = torch.ones(1 << 24, dtype=torch.int64)  # 128 MiB, more than caches hold
        self._x, self._weight = torch.randn(256, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
        self._packed = pack(self._weight)
        self.flops = self.bytes = 0.0  # per second; multiply-adds count two

    def look(self) -> None:
        """Time a plain read, and a product with a weight that caches hold."""
        self.bytes = max(self.bytes, self._memory.nbytes / _seconds(lambda: read([self._memory])))
        for work in (
            lambda: linear(self._x, self._packed, None, None),
            lambda: torch.nn.functional.linear(self._x, self._weight),
        ):
            self.flops = max(self.flops, 2.0 * self._x.numel() * self._weight.shape[0] / _seconds(work))

    def us(self, flops: float, nbytes: float) -> float:
        """Microseconds that so much takes at least."""
        return max(flops / self.flops, nbytes / self.bytes) * 1e6


@dataclass(frozen=True, slots=True)
class Product:
    """The matrices of one kind in all layers: a step's rows times [in, out] each."""

    layers: int
    rows_in: int
    rows_out: int

    def us(self, rows: int, last_rows: int, limits: Limits) -> float:
        """Microseconds for ``rows`` in each layer, in the last one for ``last_rows``."""
        elements = float(self.rows_in * self.rows_out)
        return limits.us(2.0 * elements * ((self.layers - 1) * rows + last_rows), 2.0 * elements * self.layers)


def products(config: ModelConfig) -> dict[str, Product]:
    """By kind."""
    layers, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    query, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "qkv": Product(layers, hidden, query + 2 * kv),
        "o": Product(layers, query, hidden),
        "gate_up": Product(layers, hidden, 2 * inner),
        "down": Product(layers, inner, hidden),
        "head": Product(1, hidden, config.vocab_size),
    }


class Executor:
    """A launcher, and the plans that make its rows decode or prefill; rows' blocks lie scattered."""

    def __init__(self, checkpoint: Path, threads: int, stopwatch: Stopwatch) -> None:
        runners: list[tuple[CausalLM, KVCache]] = []
        make = ModelRunner.__init__

        def noted(runner: ModelRunner, model: CausalLM, kv_cache: KVCache, *args: object, **kwargs: object) -> None:
            runners.append((model, kv_cache))
            make(runner, model, kv_cache, *args, **kwargs)  # type: ignore[arg-type]

        with mock.patch.object(ModelRunner, "__init__", noted):
            settings = ExecutorSettings(
                model=checkpoint,
                threads=threads,
                num_blocks=64 * (CONTEXT // BLOCK_SIZE + _SPARE_BLOCKS),
                dtype="bfloat16",
                max_rows=64,
                max_batched_tokens=_MAX_TOKENS,
                block_size=BLOCK_SIZE,
            )
            self._launcher: StepLauncher = startup.prepare(settings)[0]
        ((model, kv_cache),) = runners
        for tensor in (*kv_cache.keys, *kv_cache.values):
            tensor.normal_()  # pages that nobody wrote would all be the same one
        self.config = model.config
        self._blocks = np.random.default_rng(0).permutation(kv_cache.num_blocks).astype(np.int32)
        stopwatch.weights = _addresses(model)

    def decode(self, rows: int) -> Callable[[], StepPlan]:
        """Plans that make all of ``rows`` requests decode one more token after ``CONTEXT``."""
        tables, admissions = self._admit(rows, CONTEXT // BLOCK_SIZE + _SPARE_BLOCKS)
        ones, starts = np.ones(rows, np.int32), np.full(rows, CONTEXT, np.int32)
        self.launch(self._plan(tables, starts, ones, EXPLICIT, admissions))

        def plan() -> StepPlan:
            starts[:] += 1
            return self._plan(tables, starts.copy(), ones, 0)

        return plan

    def prefill(self, tokens: int) -> Callable[[], StepPlan]:
        """Plans that run a whole prompt of ``tokens`` in an executor with nothing else to do."""

        def plan() -> StepPlan:
            tables, admissions = self._admit(1, tokens // BLOCK_SIZE)
            return self._plan(tables, np.zeros(1, np.int32), np.array([tokens], np.int32), EXPLICIT, admissions)

        return plan

    def launch(self, plan: StepPlan) -> None:
        """From plan to result."""
        self._launcher.launch(plan).wait()

    def _admit(self, rows: int, blocks_per_row: int) -> tuple[BlockTables, tuple[Admission, ...]]:
        self._launcher.reset()
        tables = BlockTables(rows, blocks_per_row, self._blocks.size, BLOCK_SIZE)
        blocks = self._blocks[: rows * blocks_per_row]
        tables.append(np.repeat(np.arange(rows, dtype=np.int32), blocks_per_row), blocks)
        shares = blocks.reshape(rows, blocks_per_row)
        return tables, tuple(Admission(row, share, RowSampling()) for row, share in enumerate(shares))

    def _plan(
        self,
        tables: BlockTables,
        starts: Int32s,
        counts: Int32s,
        flags: int,
        admissions: tuple[Admission, ...] = (),
    ) -> StepPlan:
        rows, none = np.arange(starts.size, dtype=np.int32), np.zeros(0, np.int32)
        positions = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
        return StepPlan(
            step_id=0,
            released_rows=none,
            admissions=admissions,
            extend_rows=none,
            extend_blocks=none,
            rows=rows,
            num_tokens=counts,
            start_positions=starts,
            flags=np.full(rows.size, flags | SAMPLE, np.uint8),
            prefill_token_ids=positions.astype(np.int32) if flags & EXPLICIT else none,
            slot_mapping=tables.slots(np.repeat(rows, counts), positions).astype(np.int32),
            table_hashes=tables.hashes(rows),
        )


def _addresses(model: CausalLM) -> dict[int, str]:
    """Where the matrices of each kind lie."""
    modules: list[tuple[str, ParallelLMHead | MergedColumnParallelLinear | RowParallelLinear]]
    modules = [("head", model.lm_head)]
    found: dict[int, str] = {}
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, mlp = layer.self_attn, layer.mlp
        modules += [("qkv", attention.qkv_proj), ("o", attention.o_proj)]
        modules += [("gate_up", mlp.gate_up_proj), ("down", mlp.down_proj)]
    for kind, module in modules:
        matrices = [module._matrix]
        if isinstance(module, MergedColumnParallelLinear):
            matrices += module._parts or ()
        for matrix in matrices:
            parts = [matrix] if isinstance(matrix, Tensor) else [getattr(matrix, one.name) for one in fields(matrix)]
            found |= {part.data_ptr(): kind for part in parts if isinstance(part, Tensor)}
    return found


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def kind_limits(
    config: ModelConfig, rows: int, contexts: Sequence[int], sampled: int, limits: Limits
) -> dict[str, float]:
    """Microseconds, by kind: of matrix products, and of attention over keys and values.

    ``contexts``: keys that each of the ``rows`` tokens reads; tokens of one prompt read them from memory once. The last
    layer computes queries, and what comes after them, of ``sampled`` rows.
    """
    least = {kind: one.us(rows, sampled, limits) for kind, one in products(config).items()}
    kv_columns = 2 * config.num_key_value_heads * config.head_dim
    least["qkv"] += limits.us(2.0 * config.hidden_size * kv_columns * (rows - sampled), 0.0)  # of the last layer
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    pairs = float(sum(contexts)) * heads * layers
    stored = sum(contexts) if rows == sampled else max(contexts)  # decodes have a context each, a prompt has one
    nbytes = 4.0 * stored * config.num_key_value_heads * config.head_dim * layers
    least["attention"] = limits.us(4.0 * pairs * config.head_dim, nbytes)
    return least


class Profiler:
    """Runs steps of one executor and prints what they cost."""

    def __init__(self, shape: str, executor: Executor, stopwatch: Stopwatch, limits: Limits) -> None:
        self._shape = shape
        self._executor = executor
        self._stopwatch = stopwatch
        self._limits = limits
        self.lines: list[tuple[str, ...]] = []  # of the table

    def run(self, name: str, rows: int, next_plan: Callable[[], StepPlan], repeats: int, is_decode: bool) -> None:
        """Print a figure for the step and one for each kind; plain and timed steps take turns."""
        launch, load = self._executor.launch, ForeignLoad()
        for _ in range(2):
            launch(next_plan())
        plain: list[float] = []
        timed: list[tuple[dict[str, float], dict[str, int]]] = []
        faults = 0
        for _ in range(repeats):
            self._limits.look()
            plan = next_plan()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            plain.append(_seconds(lambda plan=plan: launch(plan)) * 1e6)  # type: ignore[misc]
            faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            plan = next_plan()
            timed.append(self._stopwatch.step(lambda plan=plan: launch(plan)))  # type: ignore[misc]
        contexts = [CONTEXT + repeats] * rows if is_decode else range(1, rows + 1)
        least = kind_limits(self._executor.config, rows, contexts, rows if is_decode else 1, self._limits)
        heading = {"bench": "profile", "shape": self._shape, "step": name}
        python = min(sum(time for kind, time in times.items() if kind in STAGES) for times, _ in timed)
        emit(
            **heading,
            us=round(min(plain), 1),
            median_us=round(statistics.median(plain), 1),
            limit_us=round(sum(least.values()), 1),
            python_us=round(python, 1),
            page_faults=round(faults / repeats, 1),
            foreign_cores=load.cores(),
        )
        self._line(name, "step", "", min(plain), sum(least.values()))
        calls = timed[-1][1]
        costs = {kind: min(times.get(kind, 0.0) for times, _ in timed) for kind in calls}
        for kind, cost in sorted(costs.items(), key=lambda item: (item[0] in STAGES, -item[1])):
            who = "python" if kind in STAGES else "kernels"
            limit = least.get(kind)
            emit(
                **heading,
                kind=kind,
                who=who,
                calls=calls[kind],
                us=round(cost, 1),
                median_us=round(statistics.median(times.get(kind, 0.0) for times, _ in timed), 1),
                limit_us=None if limit is None else round(limit, 1),
            )
            self._line("", f"{kind} (Python)" if who == "python" else kind, str(calls[kind]), cost, limit)

    def _line(self, step: str, kind: str, calls: str, cost: float, limit: float | None) -> None:
        share = "" if limit is None else f"{limit / cost:.0%}"
        self.lines.append((step, kind, calls, f"{cost:,.1f}", "" if limit is None else f"{limit:,.1f}", share))


def _print_table(shape: str, lines: Sequence[tuple[str, ...]]) -> None:
    print(f"\n| {shape} | kind | calls | us | limit, us | of limit |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def main() -> None:
    """Print the figures of each shape, and a table of them at the end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=30, help="steps of each kind (default 30)")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64], help="rows that decode")
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024], help="tokens of a prompt")
    args = parser.parse_args()
    example = torch.zeros(1, dtype=torch.bfloat16)
    emit(**environment("torch", "numpy"), threads=args.threads, kernels=library.selection(example))
    torch.set_num_threads(args.threads)
    stopwatch, limits = Stopwatch(), Limits()
    for _ in range(10):
        limits.look()
    tables: dict[str, list[tuple[str, ...]]] = {}
    with stopwatch.attached():
        for shape in args.shapes:
            executor = Executor(cached_checkpoint(shape, args.models), args.threads, stopwatch)
            profiler = Profiler(shape, executor, stopwatch, limits)
            for rows in args.rows:
                profiler.run(f"decode, {rows}", rows, executor.decode(rows), args.repeats, is_decode=True)
            for tokens in args.tokens:
                repeats = max(3, args.repeats // 8)
                profiler.run(f"prefill, {tokens}", tokens, executor.prefill(tokens), repeats, is_decode=False)
            tables[shape] = profiler.lines
            del executor, profiler
            gc.collect()
    emit(bench="limits", gflops=round(limits.flops / 1e9), read_gb_per_s=round(limits.bytes / 1e9, 1))
    for shape, lines in tables.items():
        _print_table(shape, lines)


if __name__ == "__main__":
    run_main(main)
