"""Sampling noise is well distributed and pure; nucleus filters match a plain implementation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling import gumbel_noise, mask_top_k_top_p

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(z: int) -> int:
    """SplitMix64's finaliser in plain integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def test_published_splitmix_sequence() -> None:
    """The finaliser and increment used here give SplitMix64's published first outputs for state 1234567."""
    outputs = [splitmix((1234567 + GOLDEN * step) & MASK) for step in range(1, 4)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, MASK), position=st.integers(0, 1 << 20))
def test_noise_is_the_documented_function(seed: int, position: int) -> None:
    noise = gumbel_noise(torch.tensor([signed(seed)]), torch.tensor([position]), 20)[0]
    key = splitmix((splitmix(seed) + GOLDEN * (position + 1)) & MASK)
    for token, value in enumerate(noise.tolist()):
        bits = splitmix((key + GOLDEN * (token + 1)) & MASK)
        uniform = ((bits >> 24) + 0.5) * 2.0**-40
        assert value == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-4, abs=1e-4)


def test_noise_depends_on_nothing_else() -> None:
    """Not on other rows, their number, or the size of the vocabulary."""
    seeds, positions = torch.arange(40) * -7, torch.arange(40) % 5
    expected = gumbel_noise(seeds, positions, 1003)
    order = torch.randperm(40)
    assert torch.equal(gumbel_noise(seeds[order], positions[order], 1003), expected[order])
    for row in range(40):
        assert torch.equal(gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 77)[0], expected[row, :77])


def test_noise_does_not_change_its_arguments() -> None:
    seed, position = torch.tensor([5]), torch.tensor([9])
    gumbel_noise(seed, position, 10)
    assert (seed.item(), position.item()) == (5, 9)


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel_noise(torch.arange(200), torch.zeros(200, dtype=torch.int64), 5000).double().flatten()
    assert torch.isfinite(noise).all()
    cdf = torch.exp(-torch.exp(-noise)).sort().values
    steps = torch.arange(1, len(cdf) + 1) / len(cdf)
    kolmogorov = (cdf - steps).abs().max() * math.sqrt(len(cdf))
    assert kolmogorov < 1.95  # p = 0.001


def test_neighbours_are_uncorrelated() -> None:
    """Adjacent seeds, positions and ids, and swapped roles of seed and position, share nothing."""
    size = 100
    grid = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    noise = gumbel_noise(grid[:, 0], grid[:, 1], size).double().view(size, size, size)
    noise = (noise - noise.mean()) / noise.std()
    limit = 5 / math.sqrt(noise.numel() * (size - 1) / size)
    for axis in range(3):
        neighbours = (noise.narrow(axis, 0, size - 1) * noise.narrow(axis, 1, size - 1)).mean()
        assert abs(neighbours) < limit
    for axes in ((0, 1), (0, 2), (1, 2)):
        apart = ~torch.eye(size, dtype=torch.bool)
        swapped = (noise * noise.transpose(*axes)).movedim(axes, (0, 1))[apart].mean()
        assert abs(swapped) < limit * 2


def plain_mask(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids kept, by the definition, in float64."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        least = logits[order[min(top_k, len(order)) - 1]]
        order = [i for i in order if logits[i] >= least]
    weights = np.exp(logits[order].astype(np.float64) - logits[order[0]])
    before = (np.cumsum(weights) - weights) / weights.sum()
    least = min(logits[i] for i, mass in zip(order, before, strict=True) if mass < top_p or i == order[0])
    return {i for i in order if logits[i] >= least}


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocab_size=st.integers(1, 50),
    rows=st.lists(st.tuples(st.integers(0, 60), st.floats(0.01, 0.99) | st.just(1.0)), min_size=1, max_size=5),
)
def test_mask_top_k_top_p(seed: int, vocab_size: int, rows: list[tuple[int, float]]) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (len(rows), vocab_size)).astype(np.float32)
    logits = np.round(logits, 1)  # ties
    top_k = torch.tensor([k for k, _ in rows], dtype=torch.int32)
    top_p = torch.tensor([p for _, p in rows], dtype=torch.float32)
    masked = mask_top_k_top_p(torch.from_numpy(logits), top_k, top_p)
    for row, (k, p) in enumerate(zip(top_k.tolist(), top_p.tolist(), strict=True)):
        kept = {i for i in range(vocab_size) if masked[row, i] > -torch.inf}
        assert kept == plain_mask(logits[row], k, p)
        assert all(masked[row, i] == logits[row, i] for i in kept)
    assert torch.equal(
        mask_top_k_top_p(torch.from_numpy(logits), top_k, torch.ones(len(rows))),
        mask_top_k_top_p(torch.from_numpy(logits), top_k, None),
    )
    assert torch.equal(
        mask_top_k_top_p(torch.from_numpy(logits), torch.zeros_like(top_k), top_p),
        mask_top_k_top_p(torch.from_numpy(logits), None, top_p),
    )
