"""The sampler: exact frequencies, greedy ties, rows that do not see each other, bad logits."""

from collections.abc import Sequence

import pytest
import torch
import transformers

from kernels.sampling import SamplingBatch
from kernels.sampling import sample as sample_rows
from tests.kernels.sampling_oracle import Row, batch_of


def batch(
    temperature: Sequence[float],
    top_k: Sequence[int] | None = None,
    top_p: Sequence[float] | None = None,
    seed: Sequence[int] | None = None,
    position: Sequence[int] | None = None,
) -> SamplingBatch:
    rows = len(temperature)
    return SamplingBatch(
        temperature=torch.tensor(temperature, dtype=torch.float32),
        top_k=torch.tensor(top_k or [0] * rows, dtype=torch.int32),
        top_p=torch.tensor(top_p or [1.0] * rows, dtype=torch.float32),
        seed=torch.tensor(seed or range(rows), dtype=torch.int64),
        position=torch.tensor(position or [0] * rows, dtype=torch.int64),
        all_greedy=not any(temperature),
        any_top_k=any(top_k or ()),
        any_top_p=any(p < 1 for p in top_p or ()),
    )


def sample(logits: torch.Tensor, sampling: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    sampled = sample_rows(logits, sampling)
    return sampled.token_ids, sampled.row_ok


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [-5.0, -4.0, -9.0, -4.0]])
    tokens, row_ok = sample(logits, batch([0, 0, 0]))
    assert tokens.tolist() == [1, 0, 1]
    assert row_ok.all()


def chi_square(logits: torch.Tensor, temperature: float, expected: torch.Tensor, **filters: list[float]) -> float:
    """Statistic of 20,000 samples at consecutive positions of one seed."""
    draws = 20_000
    repeated = {name: values * draws for name, values in filters.items()}
    sampling = batch([temperature] * draws, seed=[12345] * draws, position=list(range(draws)), **repeated)  # type: ignore[arg-type]
    tokens, _ = sample(logits.expand(draws, -1), sampling)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return float(((counts - draws * expected)[possible].square() / (draws * expected[possible])).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature: float) -> None:
    logits = torch.linspace(-2, 2, 40)
    expected = (logits.double() / temperature).softmax(-1)
    assert chi_square(logits, temperature, expected) < 73  # 39 degrees of freedom, p = 0.0008


def test_frequencies_with_filters() -> None:
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    top_3 = torch.tensor([0.4, 0.3, 0.15, 0, 0], dtype=torch.float64) / 0.85
    assert chi_square(logits, 1.0, top_3, top_k=[3]) < 14  # p = 0.001
    assert chi_square(logits, 1.0, top_3, top_p=[0.8]) < 14  # 0.7 < 0.8: the third id crosses and stays
    both = torch.tensor([0.4, 0.3, 0, 0, 0], dtype=torch.float64) / 0.7
    assert chi_square(logits, 1.0, both, top_k=[3], top_p=[0.8]) < 11  # of the top 3, 0.7 / 0.85 reaches 0.8


def test_rows_do_not_see_each_other() -> None:
    """Each row alone samples what it samples in a batch of all kinds, in any order."""
    torch.manual_seed(0)
    rows = 24
    logits = torch.randn(rows, 300) * 3
    temperature = [0.0 if row % 5 == 0 else 0.3 + row / 10 for row in range(rows)]
    top_k = [7 if row % 3 == 0 else 0 for row in range(rows)]
    top_p = [0.6 if row % 4 == 0 else 1.0 for row in range(rows)]
    seed, position = [row * 31 - 400 for row in range(rows)], [row * row for row in range(rows)]
    columns = (temperature, top_k, top_p, seed, position)
    tokens, _ = sample(logits, batch(*columns))
    for row in range(rows):
        alone, _ = sample(logits[row : row + 1], batch(*(column[row : row + 1] for column in columns)))  # type: ignore[arg-type]
        assert alone.tolist() == [tokens[row]]
    order = torch.randperm(rows).tolist()
    shuffled, _ = sample(logits[order], batch(*([column[row] for row in order] for column in columns)))
    assert shuffled.tolist() == tokens[order].tolist()


def test_tiny_temperature_and_top_k_1_are_greedy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 100) * 5
    greedy = logits.argmax(-1).tolist()
    assert sample(logits, batch([1e-38] * 8))[0].tolist() == greedy
    assert sample(logits, batch([2.0] * 8, top_k=[1] * 8))[0].tolist() == greedy
    assert sample(logits, batch([2.0] * 8, top_p=[1e-6] * 8))[0].tolist() == greedy


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bad_logits_spoil_their_row_only(bad: float, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 50)
    sampling = batch([temperature] * 4, top_k=[5] * 4, top_p=[0.9] * 4)
    expected, _ = sample(logits, sampling)
    logits[2, 17] = bad
    tokens, row_ok = sample(logits, sampling)
    assert row_ok.tolist() == [True, True, False, True]
    assert tokens.tolist() == [expected[0], expected[1], 0, expected[3]]


def test_no_rows() -> None:
    tokens, row_ok = sample(torch.zeros(0, 10), batch([]))
    assert tokens.shape == row_ok.shape == (0,)


def processed_logprobs(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Log probability of every id under the distribution that ``row`` samples from; -inf where it samples none."""
    vocab_size = logits.shape[0]
    sampled = sample_rows(logits.expand(2, -1), batch_of([row, row], vocab_size, num_top=vocab_size))
    assert sampled.logprobs is not None
    return torch.full((vocab_size,), -torch.inf).scatter_(
        0, sampled.logprobs.top_ids[1].long().flip(0), sampled.logprobs.top_logprobs[1].flip(0)
    )


@pytest.mark.parametrize("seed", range(5))
def test_processors_are_those_of_transformers(seed: int) -> None:
    """Each of those that transformers has too, and all of them in its order, which is ours."""
    torch.manual_seed(seed)
    logits, log = torch.randn(500) * 3, torch.randint(0, 500, (30,))
    repetition = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    temperature = transformers.TemperatureLogitsWarper(0.7)
    top_k, top_p = transformers.TopKLogitsWarper(40), transformers.TopPLogitsWarper(0.8)
    min_p = transformers.MinPLogitsWarper(0.05)
    past = tuple(log.tolist())
    cases: list[tuple[Row, list[transformers.LogitsProcessor]]] = [
        (Row(temperature=1.0, repetition=1.3, log=past, position=30, prompt_len=9), [repetition]),
        (Row(temperature=0.7), [temperature]),
        (Row(temperature=1.0, top_k=40), [top_k]),
        (Row(temperature=1.0, top_p=0.8), [top_p]),
        (Row(temperature=1.0, min_p=0.05), [min_p]),
        (
            Row(0.7, 40, 0.8, 0.05, 1.3, log=past, position=30, prompt_len=9),
            [repetition, temperature, top_k, top_p, min_p],
        ),
    ]
    for row, processors in cases:
        scores = logits.unsqueeze(0)
        for processor in processors:
            scores = processor(log.unsqueeze(0), scores)
        torch.testing.assert_close(processed_logprobs(logits, row), scores[0].log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_frequencies_with_everything_on() -> None:
    """20,000 samples of one row with all processors and filters follow the distribution they report."""
    torch.manual_seed(3)
    logits, draws = torch.randn(60) * 1.5, 20_000
    log = tuple(torch.randint(0, 60, (25,)).tolist())
    allowed = frozenset(range(0, 60, 2)) | {1, 3, 5}
    everything = {"repetition": 1.2, "frequency": 0.3, "presence": -0.4, "allowed": allowed, "bias": {2: 1.5, 5: -1.0}}
    row = Row(0.9, 25, 0.95, 0.01, log=log, position=25, prompt_len=10, **everything)  # type: ignore[arg-type]
    expected = processed_logprobs(logits, row).double().exp()
    rows = [Row(**{**vars(row), "seed": seed}) for seed in range(draws)]
    tokens = sample_rows(logits.expand(draws, -1), batch_of(rows, 60)).token_ids
    counts = torch.bincount(tokens, minlength=60).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert 10 < possible.sum() < 30
    statistic = ((counts - draws * expected)[possible].square() / (draws * expected[possible])).sum()
    assert statistic < 58  # 29 degrees of freedom or fewer, p = 0.001
