"""The least time that a workload can take with our own matrix products; ``floor_meter`` measures what it needs.

It is that of an ideal schedule, whatever any system does: prompts fill steps of as many tokens as a step may have, in
the order of the requests, and then all requests decode together, each until it has its tokens. Full blocks of a prompt
that another one has begun with are not computed again. Only rows that are sampled go through the head, and in the last
layer the others only through the columns of keys and values. A workload takes as long as

- the products of each step's rows with the weights: our own kernels, timed on matrices like the model's that caches do
  not hold, at some numbers of rows, on straight lines in between; for one row a plain read of the weights, if that is
  faster (torch's sum of int64 on all threads, huge pages);
- and attention: the keys and values that earlier steps wrote at the speed of a plain read, in a step each once however
  many rows share them; or its multiply-adds at the best rate of those products; whichever takes longer in total.

Nothing is counted for norms, sampling, embedding, scheduling, sockets and Python.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.profile_step import products
from benchmarks.workloads import Request
from executor_service.models.config import ModelConfig

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Step:
    """What a step must do: ``rows`` tokens, of which ``sampled`` go on to the head; ``stored``: tokens whose keys and
    values it reads; ``pairs``: how many queries meet how many keys, ``last_pairs`` in the last layer.
    """

    rows: int
    sampled: int
    stored: int
    pairs: int
    last_pairs: int


class PrefixBlocks:
    """Full blocks of all prompts so far: equal ones after equal ones are one."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], int] = {}

    def add(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The prompt's full blocks, and how many of its tokens need no computation; the last one always does."""
        ends = range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE)
        prefixes = [tuple(prompt[:end]) for end in ends]
        hits = sum(prefix in self._known for prefix in prefixes)
        blocks = [self._known.setdefault(prefix, len(self._known)) for prefix in prefixes]
        return blocks, min(hits, (len(prompt) - 1) // BLOCK_SIZE) * BLOCK_SIZE


def schedule(requests: Sequence[Request], prefixes: PrefixBlocks, max_batched_tokens: int) -> list[Step]:
    """Ideal steps for requests that come together, after those that ``prefixes`` has seen."""
    added = [prefixes.add(request.prompt) for request in requests]
    steps: list[Step] = []
    chunks: list[_Chunk] = []
    room = max_batched_tokens
    for request, (blocks, start) in zip(requests, added, strict=True):
        end = start
        while end < len(request.prompt):
            begin, end = end, min(end + room, len(request.prompt))
            chunks.append(_Chunk(blocks, begin, end, end == len(request.prompt)))
            room -= end - begin
            if room == 0:
                steps.append(_step(chunks))
                chunks, room = [], max_batched_tokens
    if chunks:
        steps.append(_step(chunks))
    for decoded in range(1, max(request.max_tokens for request in requests)):
        running = [
            (len(request.prompt) + decoded - 1, blocks)
            for request, (blocks, _) in zip(requests, added, strict=True)
            if request.max_tokens > decoded
        ]
        steps.append(_step([_Chunk(blocks, place, place + 1, True) for place, blocks in running]))
    return steps


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens [start, end) of a request whose prompt has these full blocks."""

    blocks: Sequence[int]
    start: int
    end: int
    sampled: bool


def _step(chunks: Sequence[_Chunk]) -> Step:
    shared: set[int] = set()
    own = 0
    for chunk in chunks:
        before = chunk.blocks[: chunk.start // BLOCK_SIZE]
        shared.update(before)
        own += chunk.start - len(before) * BLOCK_SIZE
    return Step(
        rows=sum(chunk.end - chunk.start for chunk in chunks),
        sampled=sum(chunk.sampled for chunk in chunks),
        stored=len(shared) * BLOCK_SIZE + own,
        pairs=sum((chunk.end * (chunk.end + 1) - chunk.start * (chunk.start + 1)) // 2 for chunk in chunks),
        last_pairs=sum(chunk.end for chunk in chunks if chunk.sampled),
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by number of rows, on straight lines between those that were measured."""

    points: Mapping[int, float]

    def at(self, rows: int) -> float:
        """Seconds for so many rows; 0 for none. Raises ``KeyError`` outside what was measured."""
        if rows == 0:
            return 0.0
        low, high = neighbours(rows)
        if low == high:
            return self.points[low]
        part = (rows - low) / (high - low)
        return self.points[low] * (1 - part) + self.points[high] * part


def neighbours(rows: int) -> tuple[int, int]:
    """The nearest numbers of rows to measure, not above and not below: powers of two, and those times three."""
    known = sorted(base << shift for base in (1, 3) for shift in range(rows.bit_length() + 1))
    place = bisect_left(known, rows)
    return (rows, rows) if known[place] == rows else (known[place - 1], known[place])


@dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured: products with the weights of one layer, with a layer's columns of keys and values, and with
    the head; bytes per second of a plain read; floating-point operations per second of products.
    """

    layer: Curve
    keys_and_values: Curve
    head: Curve
    read_rate: float
    flop_rate: float


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds, by what needs them; reads and multiply-adds of attention may go on at once."""

    products: float
    attention_reads: float
    attention_flops: float
    weights_read: float  # all weights, once: the limit of a step with one row

    @property
    def total(self) -> float:
        return self.products + max(self.attention_reads, self.attention_flops)


def floor(steps: Iterable[Step], config: ModelConfig, speeds: Speeds) -> Floor:
    """Of these steps at these speeds."""
    layers = config.num_hidden_layers
    seconds, stored, pairs = 0.0, 0, 0
    for step in steps:
        seconds += (layers - 1) * speeds.layer.at(step.rows) + speeds.layer.at(step.sampled)
        seconds += speeds.keys_and_values.at(step.rows - step.sampled) + speeds.head.at(step.sampled)
        stored += step.stored
        pairs += (layers - 1) * step.pairs + step.last_pairs
    kv_bytes = 4.0 * stored * config.num_key_value_heads * config.head_dim * layers  # a key and a value, bfloat16
    flops = 4.0 * pairs * config.num_attention_heads * config.head_dim
    weights = sum(2.0 * one.layers * one.rows_in * one.rows_out for one in products(config).values())
    return Floor(seconds, kv_bytes / speeds.read_rate, flops / speeds.flop_rate, weights / speeds.read_rate)
