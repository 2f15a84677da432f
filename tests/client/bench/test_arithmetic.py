"""Lengths, arrivals, objectives and summaries: pure functions."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from baton.bench.arrivals import Arrivals, arrival_times
from baton.bench.lengths import MAX_TOKENS, Lengths
from baton.bench.records import CUT_OFF, OK, OpenLoop, Record, RunResult
from baton.bench.slo import Slo
from baton.bench.summary import Goodput, Latency, summarize
from baton.errors import InvalidRequestError
from baton.values import Usage

SEED = 5
LOAD = OpenLoop(2.0, Arrivals.POISSON)


def record(**changes: object) -> Record:
    """Due at 1 s, sent 10 ms late, tokens at 1.2, 1.3 and (two of them) 1.5, ended at 1.6 s."""
    good = Record(
        due=1.0,
        sent=1.01,
        arrivals=((1.2, 1), (1.3, 1), (1.5, 2)),
        ended=1.6,
        status=OK,
        error="",
        usage=Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=4),
    )
    return replace(good, **changes)  # type: ignore[arg-type]


def draws(text: str, count: int = 4000) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    lengths, random = Lengths.parse(text), np.random.default_rng(SEED)
    return np.array([lengths.draw(random) for _ in range(count)])


def test_fixed_lengths() -> None:
    assert set(draws("17")) == {17}


def test_uniform_lengths_reach_both_ends() -> None:
    assert set(draws("uniform:3-6")) == {3, 4, 5, 6}


def test_normal_lengths_are_never_below_one() -> None:
    values = draws("normal:100,20")
    assert values.mean() == pytest.approx(100, abs=2) and values.std() == pytest.approx(20, abs=1)
    assert draws("normal:2,5").min() == 1


def test_lognormal_lengths_have_their_median_and_a_bound() -> None:
    assert np.median(draws("lognormal:64,0.7")) == pytest.approx(64, rel=0.05)
    assert draws("lognormal:1000,100", 200).max() == MAX_TOKENS


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "abc", "fixed:3", "uniform:9-3", "uniform:0-3", "uniform:3", "normal:5", "normal:5,-1",
     "normal:nan,1", "lognormal:0,1", "lognormal:5,inf", "weird:1,2", "99999999999"],
)  # fmt: skip
def test_what_is_no_distribution(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="no distribution of lengths"):
        Lengths.parse(text)


def test_constant_arrivals() -> None:
    times = arrival_times(Arrivals.CONSTANT, 4.0, np.random.default_rng(SEED))
    assert list(itertools.islice(times, 4)) == [0.0, 0.25, 0.5, 0.75]


def test_poisson_arrivals_have_exponential_gaps() -> None:
    times = arrival_times(Arrivals.POISSON, 4.0, np.random.default_rng(SEED))
    gaps = np.diff([0.0, *itertools.islice(times, 20_000)])
    assert gaps.min() > 0
    # Of an exponential distribution: mean and deviation are equal, and e^-1 of the gaps exceed the mean.
    assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.03)
    assert (gaps > 0.25).mean() == pytest.approx(np.exp(-1), abs=0.01)


def test_arrivals_repeat_with_their_seed() -> None:
    one, same, other = (
        list(itertools.islice(arrival_times(Arrivals.POISSON, 1.0, np.random.default_rng(seed)), 5))
        for seed in (1, 1, 2)
    )
    assert one == same != other


def test_objectives() -> None:
    assert Slo.parse("ttft=200ms,itl=0.05s, e2e=3s") == Slo(ttft=0.2, itl=0.05, e2e=3.0)
    assert Slo.parse("itl=5ms") == Slo(itl=0.005)
    for text in ("", "ttft", "ttft=200", "ttft=-1s", "ttft=0ms", "speed=1s", "ttft=1s,ttft=2s", "ttft=xs", "ttft=infs"):
        with pytest.raises(InvalidRequestError, match="no objective"):
            Slo.parse(text)


def test_percentiles_interpolate() -> None:
    assert Latency.of([]) is None
    # Of 1..5: p50 is the third value, p90 0.6 of the way from the fourth to the fifth.
    assert Latency.of([0.003, 0.001, 0.002, 0.005, 0.004]) == Latency(mean=3.0, p50=3.0, p90=4.6, p99=4.96, max=5.0)


def test_a_summary() -> None:
    records = (
        record(),
        record(status="UNAVAILABLE", error="gone", arrivals=((1.2, 1),), usage=None),
        record(status=CUT_OFF, arrivals=(), usage=None, ended=2.0),
    )
    one = summarize(RunResult(LOAD, records, 2.0), Slo())
    assert (one.requests, one.cut_off, one.errors) == (1, 1, {"UNAVAILABLE": 1})
    assert (one.input_tokens, one.cached_tokens, one.output_tokens) == (10, 4, 5)
    assert (one.requests_per_s, one.input_tokens_per_s, one.output_tokens_per_s) == (0.5, 5.0, 2.5)
    assert one.goodput is None
    assert one.ttft_ms is not None and one.itl_ms is not None and one.e2e_ms is not None
    assert one.ttft_ms.p50 == 200.0  # from when it was due, not from when it was sent
    assert one.e2e_ms.p50 == 600.0
    assert (one.itl_ms.mean, one.itl_ms.max) == (100.0, 100.0)  # a message of two tokens after 0.2 s: two gaps of 0.1
    assert one.pause_ms is not None and one.pause_ms.max == 200.0
    assert one.send_lag_ms is not None and one.send_lag_ms.max == 10.0


def test_a_summary_of_nothing() -> None:
    one = summarize(RunResult(LOAD, (), 0.0), Slo(ttft=1.0))
    assert (one.requests, one.ttft_ms, one.requests_per_s, one.goodput) == (0, None, 0.0, Goodput(0.0, 0.0))


def test_goodput_counts_what_meets_every_objective() -> None:
    slow_start = record(arrivals=((1.5, 1), (1.55, 1)))
    slow_tokens = record(arrivals=((1.1, 1), (1.4, 1)))
    failed = record(status="INTERNAL", usage=None)
    cut = record(status=CUT_OFF, usage=None)
    one_token = record(arrivals=((1.1, 1),))
    result = RunResult(LOAD, (record(), slow_start, slow_tokens, failed, cut, one_token), 4.0)
    shares = {
        Slo(ttft=0.3, itl=0.15): 2 / 5,
        Slo(ttft=0.3): 3 / 5,
        Slo(itl=0.15): 3 / 5,
        Slo(e2e=0.5): 0.0,
    }
    for slo, share in shares.items():
        assert summarize(result, slo).goodput == Goodput(round(share * 5 / 4, 3), share)
