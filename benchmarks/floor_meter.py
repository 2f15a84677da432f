"""How fast our own matrix products, on weights like a model's, and a plain read are now: what ``floor`` asks for."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contenders import read
from benchmarks.floor import Curve, Floor, PrefixBlocks, Speeds, Step, floor, neighbours, schedule
from benchmarks.profile_step import products
from benchmarks.workloads import Request
from executor_service.models.config import load_config
from kernels.linear import PackedMatrix, linear, linear_silu_and_mul, pack
from kernels.native.library import noting

_REPEATS = 3  # of products with a number of rows; the least of them counts
_READS = 10  # likewise
_WARM_UP_SECONDS = 0.2
_LAYER_BYTES = 64 << 20  # of layers' weights, at least: with the head's, more than caches hold
_RANDOM_VALUES = 1 << 20  # then the same ones again


class NoPackedWeightsError(Exception):
    """There are no native kernels here, and nothing to measure."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Linear layers one after another, ``count`` times the same ones with other weights; results of ``out_dtype``."""

    weights: Sequence[PackedMatrix]
    count: int = 1
    out_dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        return sum(weight.blocks.nbytes for weight in self.weights)

    def read(self) -> float:
        """Seconds of a plain read of all weights."""
        return _seconds(lambda: read([weight.blocks.flatten() for weight in self.weights]))

    def curve(self, numbers: Iterable[int], before_each: Callable[[], object]) -> Curve:
        """Seconds of one of ``count``, wherever a curve through these numbers of rows needs them."""
        needed = {near for rows in numbers if rows for near in neighbours(rows)}
        return Curve({rows: self._seconds(rows, before_each) / self.count for rows in sorted(needed)})

    def recorded(self, rows: int) -> Callable[[], None]:
        """Repeats the native calls for random rows, into the same memory, with next to no Python in between."""
        calls: list[Callable[[], object]] = []
        columns = {weight.columns for weight in self.weights}
        inputs = {count: torch.randn(rows, count).bfloat16() for count in columns}
        with noting(lambda function, arguments: calls.append(function.bind(*arguments))):
            outputs = [self._product(inputs[weight.columns], weight) for weight in self.weights]
        return partial(_call_all, calls, (inputs, outputs))

    def _seconds(self, rows: int, before_each: Callable[[], object]) -> float:
        run, times = self.recorded(rows), []
        for _ in range(_REPEATS):
            before_each()
            times.append(_seconds(run))
        return min(times)

    def _product(self, x: Tensor, weight: PackedMatrix) -> Tensor:
        if weight.gated:
            return linear_silu_and_mul(x, weight, None)
        return linear(x, weight, None, self.out_dtype)


class FloorMeter:
    """Finds floors for one model, on as many threads as torch has been given; bfloat16."""

    def __init__(self, checkpoint: Path, max_batched_tokens: int) -> None:
        """Makes random weights of the head's size, and of as many layers as caches cannot hold.

        Raises ``NoPackedWeightsError``.
        """
        config = load_config(checkpoint)
        self._config, self._max_batched_tokens = config, max_batched_tokens
        self._prefixes = PrefixBlocks()
        kinds = products(config)
        head = kinds.pop("head")
        layer_bytes = sum(2 * one.rows_in * one.rows_out for one in kinds.values())
        count = min(config.num_hidden_layers, -(-_LAYER_BYTES // layer_bytes))
        layers = [
            _matrix(one.rows_out, one.rows_in, gated=kind == "gate_up")
            for _ in range(count)
            for kind, one in kinds.items()
        ]
        kv_columns = 2 * config.num_key_value_heads * config.head_dim
        self._layers = Chain(layers, count)
        self._keys_and_values = Chain([_matrix(kv_columns, config.hidden_size)])
        self._head = Chain([_matrix(head.rows_out, head.rows_in)], out_dtype=torch.float32)

    def measure(self, bursts: Iterable[Sequence[Request]]) -> Floor:
        """The floor of requests that come burst after burst, at the speed that the machine has now."""
        steps = [step for burst in bursts for step in schedule(burst, self._prefixes, self._max_batched_tokens)]
        return floor(steps, self._config, self._speeds(steps))

    def _speeds(self, steps: Sequence[Step]) -> Speeds:
        """Products first, without a pause: threads that slept, or torch's that spin after a read, slow them down."""
        layers, head = self._layers.recorded(1), self._head.recorded(1)
        ends = time.perf_counter() + _WARM_UP_SECONDS
        while time.perf_counter() < ends:
            layers()
        sampled = [step.sampled for step in steps]
        rest = [step.rows - step.sampled for step in steps]
        # What runs before each repetition drives the others' weights out of the caches.
        layer = self._layers.curve([step.rows for step in steps] + sampled, head)
        keys_and_values = self._keys_and_values.curve(rest, head)
        head_curve = self._head.curve(sampled, layers)
        reads = min(self._layers.read() + self._head.read() for _ in range(_READS))
        read_rate = (self._layers.nbytes + self._head.nbytes) / reads
        flops = 2.0 * sum(weight.rows * weight.columns for weight in self._layers.weights) / self._layers.count
        return Speeds(
            layer=_not_slower(layer, self._layers.nbytes / self._layers.count / read_rate),
            keys_and_values=keys_and_values,
            head=_not_slower(head_curve, self._head.nbytes / read_rate),
            read_rate=read_rate,
            flop_rate=max(flops * rows / seconds for rows, seconds in layer.points.items()),
        )


def _not_slower(curve: Curve, one_row: float) -> Curve:
    """The curve with at most so many seconds for one row."""
    known = {rows: seconds if rows > 1 else min(seconds, one_row) for rows, seconds in curve.points.items()}
    return Curve(known)


def _matrix(rows: int, columns: int, gated: bool = False) -> PackedMatrix:
    values = torch.randn(_RANDOM_VALUES).bfloat16()
    weight = values.repeat(-(-rows * columns // _RANDOM_VALUES))[: rows * columns].view(rows, columns)
    packed = pack(weight, gated=gated)
    if not isinstance(packed, PackedMatrix):
        raise NoPackedWeightsError("there are no native kernels here")
    return packed


def _call_all(calls: Iterable[Callable[[], object]], memory: object) -> None:
    """``memory`` is what they read and write."""
    for call in calls:
        call()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
