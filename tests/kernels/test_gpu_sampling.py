"""Triton's noise and filters, interpreted: the documented integers, the defined sets, no bit from neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

from kernels.sampling import gpu, reference

from .test_native_sampling import plain_mask
from .test_sampling import GOLDEN, MASK, signed, splitmix


@triton.jit
def _store_bits(seed, position, out, SIZE: tl.constexpr):
    ids = tl.arange(0, SIZE)
    tl.store(out + ids, gpu.noise_bits(tl.load(seed), tl.load(position), ids).to(tl.int64, bitcast=True))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, MASK), position=st.integers(0, 1 << 20))
def test_noise_has_the_documented_bits(seed: int, position: int) -> None:
    out = torch.empty(16, dtype=torch.int64)
    _store_bits[(1,)](torch.tensor([signed(seed)]), torch.tensor([position]), out, SIZE=16)
    key = splitmix((splitmix(seed) + GOLDEN * (position + 1)) & MASK)
    assert out.tolist() == [signed(splitmix((key + GOLDEN * (token + 1)) & MASK)) for token in range(16)]


def test_noise_is_the_references() -> None:
    torch.manual_seed(0)
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (8,)), torch.randint(0, 1 << 20, (8,))
    noise = gpu.gumbel_noise(seeds, positions, 20_001)
    torch.testing.assert_close(noise, reference.gumbel_noise(seeds, positions, 20_001), rtol=1e-5, atol=2e-6)
    for size, block in ((1, 16), (7, 64), (1025, 256)):
        assert torch.equal(gpu.gumbel_noise(seeds[3:5], positions[3:5], size, block), noise[3:5, :size])
    assert gpu.gumbel_noise(seeds[:0], positions[:0], 5).shape == (0, 5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(1, 300),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    rows=st.lists(st.tuples(st.integers(0, 320), st.floats(0.01, 0.99) | st.just(1.0)), min_size=1, max_size=3),
)
def test_mask(seed: int, vocab_size: int, spread: float, rows: list[tuple[int, float]]) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, (len(rows), vocab_size)).astype(np.float32)
    if seed % 2:
        logits = np.round(logits, 1)  # ties, and zeros of both signs
    top_k = torch.tensor([k for k, _ in rows], dtype=torch.int32)
    top_p = torch.tensor([p for _, p in rows], dtype=torch.float32)
    masked = gpu.mask_top_k_top_p(torch.from_numpy(logits), top_k, top_p)
    for row, (k, p) in enumerate(zip(top_k.tolist(), top_p.tolist(), strict=True)):
        kept = set(torch.nonzero(masked[row] > -torch.inf).flatten().tolist())
        assert kept == plain_mask(logits[row], k, p)
        assert all(masked[row, i] == logits[row, i] for i in kept)


def test_mask_rows_and_tiles_share_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 500) * 3
    logits[0, 7] = -torch.inf  # what a grammar forbids
    top_k, top_p = torch.tensor([0, 50, 1, 9000, 7], dtype=torch.int32), torch.tensor([0.9, 1.0, 0.5, 0.99, 0.8])
    masked = gpu.mask_top_k_top_p(logits, top_k, top_p)
    for block in (128, 256):
        assert torch.equal(gpu.mask_top_k_top_p(logits, top_k, top_p, block), masked)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(gpu.mask_top_k_top_p(logits[one], top_k[one], top_p[one]), masked[one])
    by_count, by_mass = gpu.mask_top_k_top_p(logits, top_k, None), gpu.mask_top_k_top_p(logits, None, top_p)
    assert torch.equal(by_count, reference.mask_top_k_top_p(logits, top_k, None))
    assert ((by_mass > -torch.inf) != (reference.mask_top_k_top_p(logits, None, top_p) > -torch.inf)).sum() <= 1
