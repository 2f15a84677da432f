"""Triton's paged attention, interpreted: against the torch reference, and its bits against everything they must not
depend on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernels.kv_append import gpu as append_gpu
from kernels.paged_attention import gpu, plan_attention, reference
from tests.kernels.paged import Paged, Requests

TILES = pytest.mark.parametrize("rows", [16, 32, 64])
SIDES = pytest.mark.parametrize("side_by_side", [False, True], ids=["one-program", "side-by-side"])


def run(step: Paged, rows: int | None = None, side_by_side: bool | None = None, exact: bool = False) -> torch.Tensor:
    return gpu.paged_attention(*step.arguments, rows=rows, side_by_side=side_by_side, exact=exact)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (5, 5), (20, 1)]),
    head_dim=st.sampled_from([4, 20, 64, 80]),
    block_size=st.sampled_from([1, 16, 48, 256]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_matches_the_reference(
    seed: int, lengths: list[int], heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    requests = Requests(lengths, heads, head_dim, block_size, dtype, seed)
    parts = [
        (row, int(rng.choice([1, rng.integers(1, min(20, length) + 1)])), length) for row, length in enumerate(lengths)
    ]
    step = requests.step(parts, padding=int(rng.integers(0, 40)), padded_requests=int(rng.integers(0, 3)))
    expected = reference.paged_attention(*step.arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for side_by_side in (False, True):
        output = run(step, side_by_side=side_by_side)
        real = step.plan.num_tokens
        torch.testing.assert_close(output[:real], expected[:real], rtol=tolerance, atol=tolerance)
        assert torch.equal(output[real:], torch.zeros_like(output[real:]))


@TILES
@SIDES
def test_bits_do_not_depend_on_tiles_chunks_or_company(rows: int, side_by_side: bool) -> None:
    """Every position of a request: prefilled whole and alone, in chunks beside others, or decoded one by one."""
    requests = Requests([290, 270, 40], heads=(3, 1), head_dim=20, dtype=torch.float16)
    whole = run(requests.step([(0, 30, 290)]), rows=64, side_by_side=False)
    chunks = [
        run(requests.step([(1, 4, 262), (0, 13, 273), (2, 1, 40)], padding=3), rows, side_by_side)[4:17],
        run(requests.step([(0, 17, 290), (1, 1, 270)], padded_requests=2), rows, side_by_side)[:17],
    ]
    assert torch.equal(torch.cat(chunks), whole)
    for end in (256, 257, 290):
        decoded = run(requests.step([(2, 1, 33), (0, 1, end), (1, 1, 270)]), rows, side_by_side)[1]
        alone = run(requests.step([(0, 1, end)]), rows, side_by_side)[0]
        assert torch.equal(decoded, alone)
        if end > 260:
            assert torch.equal(decoded, whole[end - 261])


@pytest.mark.parametrize("block_size", [1, 48, 256])
def test_bits_do_not_depend_on_blocks(block_size: int) -> None:
    lengths = [300, 7]
    parts = [(0, 5, 300), (1, 7, 7)]
    expected = run(Requests(lengths, block_size=16).step(parts))
    assert torch.equal(run(Requests(lengths, block_size=block_size).step(parts)), expected)


def test_the_exact_mode_has_one_tile() -> None:
    """For a decode the same as for a prefill, in the dtypes that matrix units multiply."""
    requests = Requests([70, 70], dtype=torch.float16)
    decode, prefill = requests.step([(0, 1, 70)]), requests.step([(0, 20, 70)])
    chosen = [
        gpu._launch_of(step.query, step.key_cache, step.plan, step.plan.on_device, exact, None).rows
        for exact in (True, False)
        for step in (decode, prefill)
    ]
    assert chosen == [64, 64, 16, 64]
    assert torch.equal(run(decode, exact=True)[0], run(prefill, exact=True)[-1])


def test_a_step_of_nothing() -> None:
    """Padding alone, and no token at all."""
    step = Requests([20]).step([(0, 1, 20)], padding=4)
    empty = Requests([20]).step([(0, 0, 0)], padding=9, padded_requests=1)
    assert torch.equal(run(empty), torch.zeros(9, 4, 16))
    none = gpu.paged_attention(step.query[:0], *step.arguments[1:])
    assert none.shape == (0, 4, 16)


def test_caches_larger_than_32_bits_can_address() -> None:
    """More than 2^31 elements; pages exist only where something is written. One memory holds keys and values."""
    block_size, kv_heads, head_dim, last = 16, 2, 16, (1 << 22) + 5
    memory = torch.from_numpy(np.zeros((last + 1, block_size, kv_heads, head_dim), np.float16))
    near = torch.zeros(2, block_size, kv_heads, head_dim, dtype=torch.float16)
    assert memory.numel() > 1 << 31
    lines, query = torch.randn(20, kv_heads, head_dim).half(), torch.randn(2, 4, head_dim).half()
    starts, lengths = np.array([0, 2], np.int32), np.array([20], np.int32)
    outputs = []
    for cache, blocks in ((memory, [last, last - 1]), (near, [0, 1])):
        slots = torch.tensor([blocks[place // 16] * 16 + place % 16 for place in range(20)])
        append_gpu.kv_append(lines, lines, cache, cache, slots)
        assert torch.equal(cache.view(-1, kv_heads, head_dim)[slots], lines)
        plan = plan_attention(starts, lengths, torch.tensor([blocks], dtype=torch.int32), 16, 2)
        outputs.append(gpu.paged_attention(query, cache, cache, plan, 0.25))
    assert torch.equal(*outputs)
