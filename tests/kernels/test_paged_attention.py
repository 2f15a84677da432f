"""Paged attention against a naive float64 softmax, on random ragged batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_append import kv_append
from kernels.paged_attention import KEY_TILE, paged_attention, plan_attention


def naive(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One request in float64: the n rows of query are the last n positions of keys and values [len, kv_heads, dim]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    n, length = scores.shape[1:]
    hidden = torch.ones(n, length, dtype=torch.bool).triu(length - n + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def check(
    seed: int,
    lengths: list[tuple[int, int]],  # (KV length, query tokens) of each request
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    num_heads, kv_heads = heads
    blocks_of = [-(-length // block_size) for length, _ in lengths]
    num_blocks = sum(blocks_of) + 3
    # Blocks are placed at random in memory full of NaN, as stale memory may be.
    memory = torch.full((2, num_blocks + 1, block_size, kv_heads, head_dim), torch.nan, dtype=dtype)
    key_cache, value_cache = memory[0], memory[1]
    order = rng.permutation(num_blocks)
    tables = np.full((len(lengths), max(blocks_of)), num_blocks, np.int32)
    queries, expected, taken = [], [], 0
    scale = 1 / math.sqrt(head_dim)
    for row, ((length, count), blocks) in enumerate(zip(lengths, blocks_of, strict=True)):
        tables[row, :blocks] = order[taken : taken + blocks]
        taken += blocks
        positions = np.arange(length)
        slots = torch.from_numpy(
            tables[row, positions // block_size].astype(np.int64) * block_size + positions % block_size
        )
        keys, values = torch.randn(2, length, kv_heads, head_dim).to(dtype)
        kv_append(keys, values, key_cache, value_cache, slots)
        queries.append(torch.randn(count, num_heads, head_dim).to(dtype))
        expected.append(naive(queries[-1], keys, values, scale))
    padding = torch.randn(3, num_heads, head_dim).to(dtype)
    starts = np.concatenate([[0], np.cumsum([count for _, count in lengths])]).astype(np.int32)
    seq_lens = np.array([length for length, _ in lengths], np.int32)
    plan = plan_attention(starts, seq_lens, torch.from_numpy(tables), block_size, num_heads // kv_heads)
    output = paged_attention(torch.cat([*queries, padding]), key_cache, value_cache, plan, scale)
    assert output.dtype == dtype
    assert torch.equal(output[-3:], torch.zeros_like(padding))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(output[:-3].double(), torch.cat(expected), rtol=tolerance, atol=tolerance)


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int]]:
    lengths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=8))
    return [(length, draw(st.one_of(st.just(1), st.integers(1, length)))) for length in lengths]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=batches(),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (7, 1), (5, 5), (20, 1), (32, 2)]),
    head_dim=st.sampled_from([4, 16, 20, 64]),
    block_size=st.sampled_from([1, 4, 16, 48, 64, 128]),
)
def test_random_batches(
    seed: int, lengths: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, block_size: int
) -> None:
    check(seed, lengths, heads, head_dim, block_size)


@pytest.mark.parametrize("length", [KEY_TILE - 1, KEY_TILE, KEY_TILE + 1, 2 * KEY_TILE, 2 * KEY_TILE + 1])
def test_tile_boundaries(length: int) -> None:
    check(0, [(length, 1), (length, length), (length, 3), (1, 1)])


def test_many_slices() -> None:
    """More query tiles than are worked on at a time, decodes and a long prefill mixed."""
    check(1, [(700, 700), *((length, 1) for length in range(1, 100))])


def test_bfloat16() -> None:
    check(2, [(300, 1), (150, 150), (90, 20)], heads=(16, 8), head_dim=64, dtype=torch.bfloat16)


def test_requests_without_queries_are_skipped() -> None:
    """Rows with no token in this step, as in padded request arrays."""
    check(3, [(20, 2), (30, 0), (8, 8)])


def test_padding_only() -> None:
    """A step of no real tokens gives zeros."""
    plan = plan_attention(np.zeros(2, np.int32), np.zeros(1, np.int32), torch.zeros(1, 1, dtype=torch.int32), 16, 2)
    cache = torch.zeros(2, 16, 2, 8)
    output = paged_attention(torch.randn(4, 4, 8), cache, cache, plan, 1.0)
    assert torch.equal(output, torch.zeros(4, 4, 8))
