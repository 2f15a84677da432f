"""Triton's sampler, interpreted: the documented integers, the definition's tokens, no bit from neighbours or chunks."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

from kernels import sampling
from kernels.gpu import library
from kernels.sampling import Sampled, composed, gpu, gpu_logprobs, gpu_processors, reference
from kernels.sampling.gpu_draws import gumbel, noise_bits

from .sampling_oracle import Row, batch_of, distribution, scores
from .sampling_rows import FEATURES, random_row
from .test_native_sampling import plain_mask
from .test_sampling import GOLDEN, MASK, signed, splitmix

CHUNK = 128  # of the vocabulary: small ones have several


@triton.jit
def _store_noise(seed, position, bits, noise, SIZE: tl.constexpr):
    ids = tl.arange(0, SIZE)
    drawn = noise_bits(tl.load(seed), tl.load(position), ids)
    tl.store(bits + ids, drawn.to(tl.int64, bitcast=True))
    tl.store(noise + ids, gumbel(drawn))


def noise_of(seed: int, position: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits, noise = torch.empty(size, dtype=torch.int64), torch.empty(size)
    _store_noise[(1,)](torch.tensor([signed(seed)]), torch.tensor([position]), bits, noise, SIZE=size)
    return bits, noise


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, MASK), position=st.integers(0, 1 << 20))
def test_noise_has_the_documented_bits(seed: int, position: int) -> None:
    bits, _ = noise_of(seed, position, 16)
    key = splitmix((splitmix(seed) + GOLDEN * (position + 1)) & MASK)
    assert bits.tolist() == [signed(splitmix((key + GOLDEN * (token + 1)) & MASK)) for token in range(16)]


def test_noise_is_the_references() -> None:
    for seed, position in ((0, 0), (MASK, 1 << 20), (12345, 678)):
        _, noise = noise_of(seed, position, 16_384)
        expected = reference.gumbel_noise(torch.tensor([signed(seed)]), torch.tensor([position]), 16_384)[0]
        torch.testing.assert_close(noise, expected, rtol=1e-5, atol=2e-6)


def check_rows(logits: torch.Tensor, rows: list[Row]) -> Sampled:
    """Tokens by the definition; what rows report as the composed sampler does."""
    vocab_size = logits.shape[1]
    batch = batch_of(rows, vocab_size, num_top=min(vocab_size, 20))
    sampled, expected = gpu.sample(logits, batch, CHUNK), composed.sample(logits, batch)
    assert sampled.row_ok.all()
    assert sampled.logprobs is not None
    assert expected.logprobs is not None
    for index, row in enumerate(rows):
        token = int(sampled.token_ids[index])
        best = scores(logits[index].tolist(), row)
        assert best[token] >= max(best.values()) - 1e-4
        possible = distribution(logits[index].tolist(), row if index % 2 else Row())
        logprob, rank = float(sampled.logprobs.logprobs[index]), int(sampled.logprobs.ranks[index])
        if token in possible:  # else rounding decided about the last one
            assert logprob == pytest.approx(possible[token], rel=1e-3, abs=1e-3)
        assert rank <= 1 + sum(value > possible.get(token, -1e9) - 1e-4 for value in possible.values())
        same = sampled.logprobs.top_ids[index] == expected.logprobs.top_ids[index]
        listed = sampled.logprobs.top_logprobs[index]
        torch.testing.assert_close(listed[same], expected.logprobs.top_logprobs[index][same], rtol=1e-3, atol=1e-3)
    return sampled


@pytest.mark.parametrize("feature", FEATURES)
def test_definition(feature: str) -> None:
    rng = np.random.default_rng(FEATURES.index(feature))
    for vocab_size, spread in ((2, 3.0), (129, 12.0), (301, 1.0)):
        rows = [random_row(rng, vocab_size, feature) for _ in range(4)]
        check_rows(torch.from_numpy(rng.normal(0, spread, (4, vocab_size)).astype(np.float32)), rows)


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 1 << 32), vocab_size=st.integers(1, 700))
def test_rows_of_all_kinds_together(seed: int, vocab_size: int) -> None:
    """Alone, or in other chunks, each has the same bits."""
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, max(vocab_size, 2), str(rng.choice(FEATURES))) for _ in range(6)]
    logits = torch.from_numpy(rng.normal(0, 3, (6, max(vocab_size, 2))).astype(np.float32))
    together = check_rows(logits, rows)
    for chunk, candidates in ((1024, 10), (64, 400)):  # few: rows search all of their logits
        again = gpu.sample(logits, batch_of(rows, logits.shape[1]), chunk, candidates)
        assert torch.equal(again.token_ids, together.token_ids)
    for row in range(2):
        alone = gpu.sample(logits[row : row + 1], batch_of(rows[row : row + 1], logits.shape[1]), CHUNK)
        assert torch.equal(alone.token_ids, together.token_ids[row : row + 1])


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(1, 300),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    rows=st.lists(st.tuples(st.integers(0, 320), st.floats(0.01, 0.99) | st.just(1.0)), min_size=1, max_size=3),
)
def test_filters_with_ties(seed: int, vocab_size: int, spread: float, rows: list[tuple[int, float]]) -> None:
    """Exactly the ids of the definition stay, those tied with the last one too."""
    logits = np.random.default_rng(seed).normal(0, spread, (len(rows), vocab_size)).astype(np.float32)
    if seed % 2:
        logits = np.round(logits, 1)  # ties, and zeros of both signs
    logits -= logits.max(1, keepdims=True)  # as the filters see them
    given = [Row(temperature=1.0, top_k=k, top_p=float(np.float32(p)), seed=seed) for k, p in rows]
    both = [one for row in given for one in (row, row)]  # odd rows report what they sample from
    batch = batch_of(both, vocab_size, num_top=vocab_size)
    sampled = gpu.sample(torch.from_numpy(np.repeat(logits, 2, 0)), batch, CHUNK, max_candidates=300 if seed % 3 else 9)
    assert sampled.logprobs is not None
    for index, row in enumerate(given):
        ids, values = sampled.logprobs.top_ids[2 * index + 1], sampled.logprobs.top_logprobs[2 * index + 1]
        assert set(ids[values > -torch.inf].tolist()) == plain_mask(logits[index], row.top_k, row.top_p)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1 << 32), vocab_size=st.integers(2, 300), block=st.sampled_from([16, 1024]))
def test_processors_have_the_composed_ones_bits(seed: int, vocab_size: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, vocab_size, str(rng.choice(FEATURES))) for _ in range(6)]
    rows[2:4] = (random_row(rng, vocab_size, "all"), Row(bias={vocab_size - 1: 1.5, 0: -2.0}))  # filled up with id 0
    logits = torch.from_numpy(rng.normal(0, 3, (6, vocab_size)).astype(np.float32))
    batch = batch_of(rows, vocab_size)
    expected = composed.process(logits, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_processors, "_BLOCK", block)
        patch.setattr(gpu_processors, "_SLICE", 2)
        assert torch.equal(gpu_processors.process(logits, batch), expected)


@pytest.mark.parametrize("vocab_size", [1, 300, 9000])
def test_log_probabilities(vocab_size: int) -> None:
    """Alone, a row has the bits that it has among others; one that is not finite fails alone."""
    logits, targets = torch.randn(7, vocab_size) * 5, torch.randint(0, vocab_size, (7,))
    logits[2, 0], logits[3, -1], logits[4] = torch.nan, torch.inf, -torch.inf
    logits[5, targets[5] - 1 :] = logits[5, targets[5]]  # equals, and what a mask left
    logits[5, : targets[5]] = -torch.inf
    together = gpu_logprobs.log_probabilities(logits, targets, 3)
    expected = composed.log_probabilities(logits, targets, 3)
    for name in ("logprobs", "top_logprobs"):
        torch.testing.assert_close(getattr(together, name), getattr(expected, name), equal_nan=True)
    assert torch.equal(together.ranks, expected.ranks)
    assert torch.equal(together.top_ids, expected.top_ids)
    assert together.ranks[2:5].tolist() == [0, 0, 0]
    for row in (0, 1, 6):
        alone = gpu_logprobs.log_probabilities(logits[row : row + 1], targets[row : row + 1], 3)
        assert torch.equal(alone.logprobs, together.logprobs[row : row + 1])
        assert torch.equal(alone.top_logprobs, together.top_logprobs[row : row + 1])


def test_rows_that_fail() -> None:
    """Not finite, nothing left to sample, or spoiled by what was added; their neighbours do not notice."""
    logits = torch.randn(8, 300)
    for row, value in ((0, torch.nan), (1, torch.inf), (2, -torch.inf)):
        logits[row, 200] = value
    logits[6] = torch.nan
    rows = [Row(temperature=float(row % 2), top_k=3 * (row > 4), seed=row) for row in range(8)]
    rows[3] = dataclasses.replace(rows[3], allowed=frozenset())
    rows[4] = dataclasses.replace(rows[4], bias={7: torch.inf})
    batch = batch_of(rows, 300, num_top=2)
    sampled, expected = gpu.sample(logits, batch, CHUNK), composed.sample(logits, batch)
    assert sampled.row_ok.tolist() == expected.row_ok.tolist() == [*[False] * 5, True, False, True]
    assert torch.equal(sampled.token_ids, expected.token_ids)
    assert sampled.logprobs is not None
    assert (sampled.logprobs.ranks == 0).tolist() == (~sampled.row_ok).tolist()


def test_equals_take_the_lowest_id_and_no_row_is_fine() -> None:
    logits = torch.zeros(2, 1000)
    logits[1, [300, 301, 999]] = 1.0
    sampled = gpu.sample(logits, batch_of([Row(), Row()], 1000), CHUNK)
    assert sampled.token_ids.tolist() == [0, 300]
    none = gpu.sample(logits[:0], batch_of([], 1000), CHUNK)
    assert (none.token_ids.shape, none.row_ok.shape) == ((0,), (0,))


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processors and reports do a few rows at a time."""
    rng = np.random.default_rng(3)
    rows = [random_row(rng, 90, feature) for feature in FEATURES]
    logits, batch = torch.randn(len(rows), 90), batch_of(rows, 90, num_top=5)
    whole = composed.sample(logits, batch)
    monkeypatch.setattr(composed, "_SLICE", 2)
    sliced = composed.sample(logits, batch)
    assert whole.logprobs is not None
    assert sliced.logprobs is not None
    assert torch.equal(sliced.token_ids, whole.token_ids)
    for name in ("logprobs", "ranks", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(sliced.logprobs, name), getattr(whole.logprobs, name))


def test_it_is_chosen_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(sampling, "available", lambda: False)
    monkeypatch.setattr(library, "interpreted", lambda: True)
    monkeypatch.setattr(
        gpu, "sample", lambda logits, batch: calls.append(logits.shape) or composed.sample(logits, batch)
    )
    sampling.sample(torch.zeros(1, 5), batch_of([Row()], 5))
    assert calls == [(1, 5)]
