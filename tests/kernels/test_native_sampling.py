"""The sampler, fused and composed, against its definition in plain Python; each instruction set alike."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling import SamplingBatch, composed, log_probabilities, mask_top_k_top_p, native, sample

from .sampling_oracle import Row, batch_of, distribution, scores
from .sampling_rows import FEATURES, random_row
from .test_native_build import ISAS, forget, use_isa


@pytest.fixture(autouse=True, scope="module", params=[*ISAS, "reference"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setenv("BATON_KERNELS", "reference")
            forget()
            yield
            forget()
        else:
            yield from use_isa(patch, request.param)


def plain_mask(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids kept, by the definition: a value stays while the mass of all greater ones is below p."""
    kept = logits[logits >= np.sort(logits)[-top_k]] if 0 < top_k < len(logits) else logits
    if top_p == 1.0:
        return set(np.flatnonzero(logits >= kept.min()))
    weights = {value: math.fsum(np.exp(kept[kept > value].astype(np.float64) - kept.max())) for value in set(kept)}
    total = math.fsum(np.exp(kept.astype(np.float64) - kept.max()))
    least = min(value for value, above in weights.items() if above < top_p * total or value == kept.max())
    return set(np.flatnonzero(logits >= least))


def check_rows(logits: torch.Tensor, rows: list[Row]) -> None:
    """Tokens, distributions, log probabilities and ranks of a batch, each row against the definition."""
    vocab_size = logits.shape[1]
    sampled = sample(logits, batch_of(rows, vocab_size, num_top=vocab_size))
    assert sampled.row_ok.all()
    assert sampled.logprobs is not None
    for index, row in enumerate(rows):
        values, token = logits[index].tolist(), int(sampled.token_ids[index])
        best = scores(values, row)
        assert best[token] >= max(best.values()) - 1e-4
        top_ids = sampled.logprobs.top_ids[index].tolist()
        top_logprobs = sampled.logprobs.top_logprobs[index]
        count = int((top_logprobs > -torch.inf).sum())
        if index % 2:
            expected = distribution(values, row)
            kept = set(top_ids[:count])
            assert set(distribution(values, row, -1e-5)) <= kept <= set(distribution(values, row, 1e-5))
            if kept != set(expected):
                continue  # rounding decided about the last one
        else:
            expected = distribution(values, Row())
            assert count == vocab_size
        given = torch.tensor([expected[one] for one in top_ids[:count]])
        torch.testing.assert_close(top_logprobs[:count], given, rtol=1e-4, atol=2e-4)
        assert (given[1:] <= given[:-1] + 1e-5).all()
        logprob, rank = float(sampled.logprobs.logprobs[index]), int(sampled.logprobs.ranks[index])
        assert logprob == pytest.approx(expected[token], rel=1e-4, abs=2e-4)
        assert sum(value > expected[token] + 1e-4 for value in expected.values()) < rank
        assert rank <= 1 + sum(value > expected[token] - 1e-4 for value in expected.values())


@pytest.mark.parametrize("feature", FEATURES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 32), vocab_size=st.integers(2, 700), spread=st.sampled_from([0.5, 3.0, 12.0]))
def test_definition(feature: str, seed: int, vocab_size: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, vocab_size, feature) for _ in range(6)]
    logits = rng.normal(0, spread, (len(rows), vocab_size)).astype(np.float32)
    check_rows(torch.from_numpy(logits), rows)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32), vocab_size=st.integers(2, 400))
def test_rows_of_all_kinds_together(seed: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, vocab_size, str(rng.choice(FEATURES))) for _ in range(12)]
    check_rows(torch.from_numpy(rng.normal(0, 3, (12, vocab_size)).astype(np.float32)), rows)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(1, 700),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    rows=st.lists(st.tuples(st.integers(0, 320), st.floats(0.01, 0.99) | st.just(1.0)), min_size=1, max_size=5),
)
def test_filters_with_ties(seed: int, vocab_size: int, spread: float, rows: list[tuple[int, float]]) -> None:
    """Exactly the ids of the definition stay, those tied with the last one too."""
    logits = np.random.default_rng(seed).normal(0, spread, (len(rows), vocab_size)).astype(np.float32)
    if seed % 2:
        logits = np.round(logits, 1)
    logits -= logits.max(1, keepdims=True)  # as the filters see them
    given = [Row(temperature=1.0, top_k=k, top_p=float(np.float32(p)), seed=seed) for k, p in rows]
    both = [one for row in given for one in (row, row)]  # odd rows report what they sample from
    sampled = sample(torch.from_numpy(np.repeat(logits, 2, 0)), batch_of(both, vocab_size, num_top=vocab_size))
    assert sampled.logprobs is not None
    for index, row in enumerate(given):
        at = 2 * index + 1
        kept = sampled.logprobs.top_ids[at][sampled.logprobs.top_logprobs[at] > -torch.inf]
        assert set(kept.tolist()) == plain_mask(logits[index], row.top_k, row.top_p)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 32), vocab_size=st.sampled_from([17, 256, 1003]))
def test_a_row_alone_and_in_any_batch(seed: int, vocab_size: int) -> None:
    """The same bits whoever shares the batch, in any order, with any number of threads."""
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, vocab_size, str(rng.choice(FEATURES))) for _ in range(9)]
    logits = torch.from_numpy(rng.normal(0, 4, (9, vocab_size)).astype(np.float32))
    logits[4, 3] = torch.nan
    processed = torch.from_numpy(rng.random(9) < 0.5)

    def run(order: list[int]) -> list[tuple[object, ...]]:
        batch = batch_of([rows[index] for index in order], vocab_size, num_top=5)
        assert batch.logprobs is not None
        request = dataclasses.replace(batch.logprobs, processed=processed[order])
        sampled = sample(logits[order], dataclasses.replace(batch, logprobs=request))
        assert sampled.logprobs is not None
        columns = (sampled.token_ids, sampled.row_ok, *dataclasses.astuple(sampled.logprobs))
        return [tuple(column[at].numpy().tobytes() for column in columns) for at in range(len(order))]

    expected = run(list(range(9)))
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        order = rng.permutation(9).tolist()
        assert run(order) == [expected[index] for index in order]
        for index in range(9):
            assert run([index]) == [expected[index]]
    torch.set_num_threads(threads)


def test_a_whole_vocabulary() -> None:
    """Fused and composed agree at a real size, where many blocks of the fused one's work meet."""
    rng = np.random.default_rng(0)
    size = 151_936
    rows = [random_row(rng, size, feature) for feature in FEATURES for _ in range(2)]
    logits = torch.from_numpy(rng.normal(0, 3, (len(rows), size)).astype(np.float32))
    batch = batch_of(rows, size, num_top=20)
    own, other = sample(logits, batch), composed.sample(logits, batch)
    assert own.token_ids.tolist() == other.token_ids.tolist()
    assert own.logprobs is not None
    assert other.logprobs is not None
    assert own.logprobs.ranks.tolist() == other.logprobs.ranks.tolist()
    torch.testing.assert_close(own.logprobs.logprobs, other.logprobs.logprobs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(own.logprobs.top_logprobs, other.logprobs.top_logprobs, rtol=1e-5, atol=2e-5)


def with_everything(rows: int, vocab_size: int) -> SamplingBatch:
    rng = np.random.default_rng(1)
    given = [random_row(rng, vocab_size, "all") for _ in range(rows)]
    return batch_of([dataclasses.replace(row, allowed=None) for row in given], vocab_size, num_top=4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 17, 299])
def test_bad_logits_spoil_their_row_only(bad: float, at: int) -> None:
    torch.manual_seed(0)
    logits, batch = torch.randn(4, 300), with_everything(4, 300)
    expected = sample(logits, batch)
    logits[2, at] = bad
    sampled = sample(logits, batch)
    assert sampled.row_ok.tolist() == [True, True, False, True]
    assert sampled.logprobs is not None
    assert expected.logprobs is not None
    others = [0, 1, 3]
    assert sampled.token_ids[others].tolist() == expected.token_ids[others].tolist()
    assert sampled.token_ids[2] == sampled.logprobs.ranks[2] == 0
    assert sampled.logprobs.logprobs.isnan().tolist() == [False, False, True, False]
    assert (sampled.logprobs.top_logprobs[2] == -torch.inf).all()
    assert torch.equal(sampled.logprobs.logprobs[others], expected.logprobs.logprobs[others])


def test_a_row_that_may_sample_nothing_fails_alone() -> None:
    rows = [Row(), Row(allowed=frozenset()), Row(temperature=1.0, allowed=frozenset()), Row(allowed=frozenset({3}))]
    sampled = sample(torch.randn(4, 40), batch_of(rows, 40, num_top=2))
    assert sampled.row_ok.tolist() == [True, False, False, True]
    assert sampled.token_ids.tolist()[1:] == [0, 0, 3]


def test_greedy_takes_the_lowest_of_equals_after_processing() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, [70, 4001]] = 2.0
    rows = [Row(bias={4999: 1.0, 4321: 1.0}), Row(), Row(allowed=frozenset({4000, 9}))]
    assert sample(logits, batch_of(rows, 5000)).token_ids.tolist() == [4321, 70, 9]


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 255, 256, 257, 2048, 2049])
def test_sizes_around_the_blocks(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(rng.normal(0, 2, (4, vocab_size)).astype(np.float32))
    logits[:, -1] = 9.0  # the last one matters
    rows = [
        Row(temperature=t, top_p=p, seed=7, position=3) for t, p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (0.1, 0.2))
    ]
    check_rows(logits, rows)


def test_log_probabilities() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 1003) * 4, torch.randint(0, 1003, (5,))
    logits[3, 8] = torch.nan
    found = log_probabilities(logits, targets, 7)
    expected = logits.double().log_softmax(-1)
    good = [0, 1, 2, 4]
    own = expected.gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.logprobs[good].double(), own[good], rtol=1e-6, atol=1e-6)
    assert found.ranks.tolist() == [
        int((row > row[t]).sum()) + 1 if i != 3 else 0 for i, (row, t) in enumerate(zip(logits, targets, strict=True))
    ]
    top = expected.topk(7)
    assert torch.equal(found.top_ids[good].long(), top.indices[good])
    torch.testing.assert_close(found.top_logprobs[good].double(), top.values[good], rtol=1e-6, atol=1e-6)
    assert found.logprobs[3].isnan()


def test_equal_log_probabilities_come_by_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0, -0.0, 0.0]])
    found = log_probabilities(logits, torch.tensor([4]), 8)
    assert found.top_ids.tolist() == [[1, 2, 4, 0, 5, 3, 6, 7]]
    assert found.ranks.tolist() == [1]
    more = log_probabilities(logits, torch.tensor([4]), 10)
    assert more.top_logprobs[0, 8:].tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("step", [0.0, 1e-3, 0.25])
def test_many_equal_logits(step: float) -> None:
    """Filters end where thousands of values cannot be told apart."""
    logits = (torch.arange(6000) % 3 * step).float().expand(4, -1).contiguous()
    rows = [Row(1.0, 10, seed=1), Row(1.0, top_p=0.5, seed=2), Row(1.0, 5000, 0.9, seed=3), Row(1.0, 2500, 0.3, 0.9)]
    check_rows(logits, rows)
    check_rows(logits, [*rows[1:], rows[0]])


def test_inputs_stay_as_they_are() -> None:
    torch.manual_seed(0)
    logits, batch = torch.randn(4, 300), with_everything(4, 300)
    before = logits.clone()
    sample(logits, batch)
    assert torch.equal(logits, before)


def test_the_arguments_of_the_fused_kernel() -> None:
    """Every pointer lies where cpu.cpp has it: a shift by one would still run on small batches."""
    fields = [name for name, _ in native._Arguments._fields_]
    source = (native.__file__ or "").replace("native.py", "cpu.cpp")
    with open(source, encoding="utf-8") as file:  # noqa: PTH123
        struct = file.read().partition("struct SampleArguments {")[2].partition("};")[0]
    declared = [name.strip(" *\n") for line in struct.split(";") for name in line.split(",")]
    assert [name.split()[-1].lstrip("*") for name in declared if name] == fields


def test_mask_of_a_whole_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 151_936) * 3
    top_k, top_p = torch.tensor([0, 50, 1, 200_000, 7], dtype=torch.int32), torch.tensor([0.9, 1.0, 0.5, 0.99, 0.8])
    masked = mask_top_k_top_p(logits, top_k, top_p)
    for row in range(5):
        alone = mask_top_k_top_p(logits[row : row + 1], top_k[row : row + 1], top_p[row : row + 1])
        assert torch.equal(alone[0], masked[row])
