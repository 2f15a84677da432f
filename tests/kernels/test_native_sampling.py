"""Native noise and filters against the torch reference."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling import gumbel_noise, mask_top_k_top_p, native, reference

from .test_native_build import ISAS, use_isa


@pytest.fixture(autouse=True, scope="module", params=ISAS)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        yield from use_isa(patch, request.param)


def test_noise() -> None:
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (20,)), torch.randint(0, 1 << 20, (20,))
    noise = native.gumbel_noise(seeds, positions, 20_001)
    torch.testing.assert_close(noise, reference.gumbel_noise(seeds, positions, 20_001), rtol=1e-5, atol=1e-6)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for size in (1, 7, 8192, 8193):
            assert torch.equal(gumbel_noise(seeds[3:5], positions[3:5], size), noise[3:5, :size])
        torch.set_num_threads(before)


def plain_mask(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids kept, by the definition: a value stays while the mass of all greater ones is below p."""
    kept = logits[logits >= np.sort(logits)[-top_k]] if 0 < top_k < len(logits) else logits
    if top_p == 1.0:
        return set(np.flatnonzero(logits >= kept.min()))
    weights = {value: math.fsum(np.exp(kept[kept > value].astype(np.float64) - kept.max())) for value in set(kept)}
    total = math.fsum(np.exp(kept.astype(np.float64) - kept.max()))
    least = min(value for value, above in weights.items() if above < top_p * total or value == kept.max())
    return set(np.flatnonzero(logits >= least))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(1, 300),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    rows=st.lists(st.tuples(st.integers(0, 320), st.floats(0.01, 0.99) | st.just(1.0)), min_size=1, max_size=5),
)
def test_mask(seed: int, vocab_size: int, spread: float, rows: list[tuple[int, float]]) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, (len(rows), vocab_size)).astype(np.float32)
    if seed % 2:
        logits = np.round(logits, 1)  # ties
    top_k = torch.tensor([k for k, _ in rows], dtype=torch.int32)
    top_p = torch.tensor([p for _, p in rows], dtype=torch.float32)
    masked = native.mask_top_k_top_p(torch.from_numpy(logits), top_k, top_p)
    for row, (k, p) in enumerate(zip(top_k.tolist(), top_p.tolist(), strict=True)):
        kept = set(torch.nonzero(masked[row] > -torch.inf).flatten().tolist())
        assert kept == plain_mask(logits[row], k, p)
        assert all(masked[row, i] == logits[row, i] for i in kept)
        alone = mask_top_k_top_p(torch.from_numpy(logits[row : row + 1]), top_k[row : row + 1], top_p[row : row + 1])
        assert torch.equal(alone[0], masked[row])


def test_mask_of_a_whole_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 151_936) * 3
    top_k, top_p = torch.tensor([0, 50, 1, 200_000, 7], dtype=torch.int32), torch.tensor([0.9, 1.0, 0.5, 0.99, 0.8])
    masked = mask_top_k_top_p(logits, top_k, top_p)
    expected = reference.mask_top_k_top_p(logits, top_k, top_p)
    # The reference adds in float32: at the nucleus's border it may differ by a few.
    assert ((masked > -torch.inf) != (expected > -torch.inf)).sum() <= 20
    assert torch.equal(mask_top_k_top_p(logits, top_k, None), reference.mask_top_k_top_p(logits, top_k, None))
