"""Native paged attention against float64, and its bits against batch, chunking, placement, block size and threads."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv_append import kv_append
from kernels.paged_attention import paged_attention, plan_attention

from .test_native_build import ISAS, use_isa


@pytest.fixture(autouse=True, scope="module", params=ISAS)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        yield from use_isa(patch, request.param)


@dataclass
class Tokens:
    """Queries, keys and values of a request's every position."""

    query: Tensor  # [length, heads, head_dim]
    key: Tensor  # [length, kv_heads, head_dim]
    value: Tensor

    @classmethod
    def random(cls, length: int, heads: int, kv_heads: int, head_dim: int) -> "Tokens":
        return cls(*(torch.randn(length, count, head_dim).bfloat16() for count in (heads, kv_heads, kv_heads)))

    def expected(self) -> Tensor:
        """Causal attention in float64."""
        length, heads, head_dim = self.query.shape
        key, value = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (self.key, self.value))
        scores = torch.einsum("qhd,khd->hqk", self.query.double(), key) / math.sqrt(head_dim)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


class Pages:
    """Caches full of NaN, blocks handed out in random order."""

    def __init__(self, seed: int, kv_heads: int, head_dim: int, block_size: int, num_blocks: int = 800) -> None:
        memory = torch.full((2, num_blocks, block_size, kv_heads, head_dim), torch.nan, dtype=torch.bfloat16)
        self.keys, self.values, self.block_size = memory[0], memory[1], block_size
        self.free = np.random.default_rng(seed).permutation(num_blocks).tolist()

    def admit(self, length: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-length // self.block_size))]

    def step(self, parts: Sequence[tuple[Tokens, list[int], int, int]]) -> list[Tensor]:
        """Positions first to last of each (sequence, blocks, first, last); their outputs."""
        tables = np.zeros((len(parts), max(len(blocks) for _, blocks, _, _ in parts)), np.int32)
        slots = []
        for row, (_, blocks, first, last) in enumerate(parts):
            tables[row, : len(blocks)] = blocks
            positions = np.arange(first, last)
            slots.append(
                tables[row, positions // self.block_size] * self.block_size + positions % self.block_size,
            )
        query, key, value = (
            torch.cat([getattr(sequence, name)[first:last] for sequence, _, first, last in parts])
            for name in ("query", "key", "value")
        )
        kv_append(key, value, self.keys, self.values, torch.from_numpy(np.concatenate(slots)).long())
        counts = [last - first for _, _, first, last in parts]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        lengths = np.array([last for *_, last in parts], np.int32)
        group = query.shape[1] // key.shape[1]
        plan = plan_attention(starts, lengths, torch.from_numpy(tables), self.block_size, group)
        output = paged_attention(query, self.keys, self.values, plan, query.shape[2] ** -0.5)
        return list(torch.split(output, counts))


def prefill(sequence: Tokens, block_size: int, seed: int = 0) -> Tensor:
    """All positions at once, alone."""
    pages = Pages(seed, sequence.key.shape[1], sequence.key.shape[2], block_size)
    length = len(sequence.query)
    return pages.step([(sequence, pages.admit(length), 0, length)])[0]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (7, 1), (5, 5), (20, 1), (16, 8)]),
    head_dim=st.sampled_from([16, 32, 48, 64, 80, 128, 256]),
    block_size=st.sampled_from([1, 4, 8, 16, 32, 48]),
)
def test_against_float64(seed: int, lengths: list[int], heads: tuple[int, int], head_dim: int, block_size: int) -> None:
    """Chunked prefills and decodes mixed."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pages = Pages(seed, heads[1], head_dim, block_size)
    requests = [(Tokens.random(length, *heads, head_dim), pages.admit(length)) for length in lengths]
    done = [0] * len(requests)
    pieces: list[list[Tensor]] = [[] for _ in requests]
    while any(count < length for count, length in zip(done, lengths, strict=True)):
        parts, owners = [], []
        for owner, (sequence, blocks) in enumerate(requests):
            left = lengths[owner] - done[owner]
            if left:
                count = int(rng.choice([1, left, int(rng.integers(1, left + 1))]))
                parts.append((sequence, blocks, done[owner], done[owner] + count))
                owners.append(owner)
                done[owner] += count
        for owner, output in zip(owners, pages.step(parts), strict=True):
            pieces[owner].append(output)
    for (sequence, _), outputs in zip(requests, pieces, strict=True):
        whole = torch.cat(outputs)
        torch.testing.assert_close(whole.double(), sequence.expected(), rtol=2e-2, atol=2e-2)
        assert torch.equal(whole, prefill(sequence, 16))


@pytest.mark.parametrize("heads", [(4, 4), (16, 8), (14, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_depend_on_the_sequence_alone(heads: tuple[int, int], head_dim: int, threads: int) -> None:
    torch.manual_seed(0)
    length = 300
    sequence = Tokens.random(length, *heads, head_dim)
    expected = prefill(sequence, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for block_size in (4, 8, 16, 32, 48, 128):
            assert torch.equal(prefill(sequence, block_size, seed=block_size), expected)
        pages = Pages(1, heads[1], head_dim, 16)
        blocks = pages.admit(length)
        one_by_one = [pages.step([(sequence, blocks, at, at + 1)])[0] for at in range(length)]
        assert torch.equal(torch.cat(one_by_one), expected)
        mates = [Tokens.random(int(size), *heads, head_dim) for size in torch.randint(1, 200, (20,))]
        parts = [(mate, pages.admit(len(mate.query)), 0, len(mate.query)) for mate in mates]
        parts.insert(7, (sequence, pages.admit(length), 0, length))
        assert torch.equal(pages.step(parts)[7], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (8, 1), (14, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_bits_at_any_number_of_rows(heads: tuple[int, int], head_dim: int) -> None:
    """Chunks of a prefill that begin and end anywhere in a tile of keys, and fill register tiles of any size."""
    torch.manual_seed(0)
    sequence = Tokens.random(90, *heads, head_dim)
    pages = Pages(0, heads[1], head_dim, 16)
    blocks = pages.admit(90)
    (expected,) = pages.step([(sequence, blocks, 0, 90)])
    torch.testing.assert_close(expected.double(), sequence.expected(), rtol=2e-2, atol=2e-2)
    for count in range(1, 14):
        for first in (0, 64 - count, 64 - count // 2, 64):
            (output,) = pages.step([(sequence, blocks, first, first + count)])
            assert torch.equal(output, expected[first : first + count])


@pytest.mark.parametrize("step", [1, 7, 300])
def test_scores_that_grow(step: int) -> None:
    """Later keys outweigh earlier ones by far, some rows' much more than others': sums decay, each row's by its own."""
    torch.manual_seed(0)
    sequence = Tokens.random(300, 4, 2, 64)
    sequence.key *= torch.linspace(0.1, 60, 300).bfloat16()[:, None, None]
    sequence.query[::3] *= 0.125
    pages = Pages(0, 2, 64, 16)
    blocks = pages.admit(300)
    whole = torch.cat([pages.step([(sequence, blocks, at, min(at + step, 300))])[0] for at in range(0, 300, step)])
    torch.testing.assert_close(whole.double(), sequence.expected(), rtol=2e-2, atol=2e-2)
    assert torch.equal(whole, prefill(sequence, 32))


def test_padding_is_zero_and_strides_are_followed() -> None:
    torch.manual_seed(0)
    pages = Pages(0, 2, 64, 16)
    sequence = Tokens.random(20, 4, 2, 64)
    blocks = pages.admit(20)
    (expected,) = pages.step([(sequence, blocks, 0, 20)])
    fused = torch.randn(23, 6 * 64).bfloat16()
    query = torch.unflatten(fused[:, 64:320], 1, (4, 64))
    query[:20] = sequence.query
    tables = torch.tensor([blocks], dtype=torch.int32)
    plan = plan_attention(np.array([0, 20], np.int32), np.array([20], np.int32), tables, 16, 2)
    output = paged_attention(query, pages.keys, pages.values, plan, 64**-0.5)
    assert torch.equal(output[:20], expected)
    assert torch.equal(output[20:], torch.zeros(3, 4, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(("name", "poison"), [("key", torch.nan), ("value", torch.nan), ("value", torch.inf)])
def test_a_poisoned_sequence_stays_alone(name: str, poison: float) -> None:
    """A key or value that overflowed spoils its own sequence's outputs, from its position on, and no others.

    Rows before it are computed in the same tiles, and share them with rows after it.
    """
    torch.manual_seed(0)
    for position in (70, 75):
        pages = Pages(0, 2, 32, 16)
        healthy, poisoned = (Tokens.random(100, 4, 2, 32) for _ in range(2))
        getattr(poisoned, name)[position] = poison
        parts = [(s, pages.admit(100), 0, 100) for s in (poisoned, healthy)]
        outputs = pages.step(parts)
        assert not outputs[0][position:].isfinite().any()
        getattr(poisoned, name)[position] = 1.0
        assert torch.equal(outputs[0][:position], prefill(poisoned, 16)[:position])
        assert torch.equal(outputs[1], prefill(healthy, 16))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_in_mixed_steps(threads: int) -> None:
    """Decodes, whose heads are worked on together, beside chunks of prefills, in steps of changing size and order."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sequences = [Tokens.random(int(length), 14, 2, 64) for length in rng.integers(1, 260, 12)]
        pages = Pages(2, 2, 64, 32)
        blocks = [pages.admit(len(sequence.query)) for sequence in sequences]
        pieces: list[list[Tensor]] = [[] for _ in sequences]
        done = np.zeros(len(sequences), np.int64)
        while left := [i for i, sequence in enumerate(sequences) if done[i] < len(sequence.query)]:
            chosen = rng.permutation(left)[: rng.integers(1, len(left) + 1)]
            ends = [min(len(sequences[i].query), done[i] + rng.choice([1, 1, 2, 5, 100])) for i in chosen]
            parts = [(sequences[i], blocks[i], int(done[i]), int(end)) for i, end in zip(chosen, ends, strict=True)]
            for i, end, output in zip(chosen, ends, pages.step(parts), strict=True):
                pieces[i].append(output)
                done[i] = end
        for sequence, outputs in zip(sequences, pieces, strict=True):
            assert torch.equal(torch.cat(outputs), prefill(sequence, 16))
    finally:
        torch.set_num_threads(before)
