"""What a run amounts to: figures over its records, without clocks or sockets."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from baton.bench.records import CUT_OFF, OK, Load, Record, RunResult
from baton.bench.slo import Slo


@dataclass(frozen=True, slots=True)
class Latency:
    """A distribution, in milliseconds. Percentiles interpolate linearly between the two nearest values."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self | None:
        """That of some values in seconds; None for no values."""
        if not seconds:
            return None
        values = np.asarray(seconds, np.float64) * 1e3
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(*(round(value, 3) for value in (float(values.mean()), p50, p90, p99, float(values.max()))))


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that ended well within the objectives: a second, and as a share of all that were sent."""

    requests_per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's figures.

    Attributes:
        load: how requests were offered.
        seconds: from the start to the end of the last request.
        requests: how many ended well; latencies are theirs.
        cut_off: how many had not ended when the run was stopped.
        errors: the others, by status.
        input_tokens, cached_tokens: prompt tokens of those that ended well, and how many of these came from the
            prefix cache.
        output_tokens: all that came.
        ttft_ms: from when the request was due to its first token.
        itl_ms: before every further token. A message of k tokens counts as k equal gaps.
        e2e_ms: from when the request was due to its end.
        pause_ms: the longest wait between two messages of each stream.
        send_lag_ms: how late requests were sent: what the generator itself adds.
        goodput: None without objectives.
    """

    load: Load
    seconds: float
    requests: int
    cut_off: int
    errors: dict[str, int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft_ms: Latency | None
    itl_ms: Latency | None
    e2e_ms: Latency | None
    pause_ms: Latency | None
    send_lag_ms: Latency | None
    goodput: Goodput | None


def summarize(result: RunResult, slo: Slo) -> Summary:
    """The figures of a run."""
    good = [record for record in result.records if record.status == OK]
    seconds = result.seconds or float("inf")
    input_tokens = sum(record.usage.prompt_tokens for record in good if record.usage)
    output_tokens = sum(count for record in result.records for _, count in record.arrivals)
    statuses = Counter(record.status for record in result.records)
    return Summary(
        load=result.load,
        seconds=round(result.seconds, 3),
        requests=len(good),
        cut_off=statuses[CUT_OFF],
        errors={status: count for status, count in sorted(statuses.items()) if status not in (OK, CUT_OFF)},
        input_tokens=input_tokens,
        cached_tokens=sum(record.usage.cached_tokens for record in good if record.usage),
        output_tokens=output_tokens,
        requests_per_s=round(len(good) / seconds, 3),
        input_tokens_per_s=round(input_tokens / seconds, 1),
        output_tokens_per_s=round(output_tokens / seconds, 1),
        ttft_ms=Latency.of([time_to_first_token(record) for record in good if record.arrivals]),
        itl_ms=Latency.of([gap for record in good for _, gap in token_gaps(record)]),
        e2e_ms=Latency.of([end_to_end(record) for record in good]),
        pause_ms=Latency.of([max(waits) for record in good if (waits := list(_waits(record)))]),
        send_lag_ms=Latency.of([record.sent - record.due for record in result.records]),
        goodput=None if slo == Slo() else _goodput(good, result, slo),
    )


def time_to_first_token(record: Record) -> float:
    """Seconds from when the request was due; it must have a token."""
    return record.arrivals[0][0] - record.due


def end_to_end(record: Record) -> float:
    """Seconds from when the request was due to its end."""
    return record.ended - record.due


def token_gaps(record: Record) -> Iterable[tuple[float, float]]:
    """When each token after the first message came, and the seconds before it."""
    for (before, _), (now, count) in itertools.pairwise(record.arrivals):
        yield from itertools.repeat((now, (now - before) / count), count)


def _waits(record: Record) -> Iterable[float]:
    return (now - before for (before, _), (now, _) in itertools.pairwise(record.arrivals))


def _goodput(good: Sequence[Record], result: RunResult, slo: Slo) -> Goodput:
    met = sum(_meets(record, slo) for record in good)
    sent = sum(record.status != CUT_OFF for record in result.records)
    return Goodput(round(met / (result.seconds or float("inf")), 3), round(met / sent, 4) if sent else 0.0)


def _meets(record: Record, slo: Slo) -> bool:
    """The inter-token objective is about a request's mean, as in DistServe (Zhong et al., 2024)."""
    gaps = [gap for _, gap in token_gaps(record)]
    return (
        bool(record.arrivals)
        and (slo.ttft is None or time_to_first_token(record) <= slo.ttft)
        and (slo.itl is None or not gaps or sum(gaps) / len(gaps) <= slo.itl)
        and (slo.e2e is None or end_to_end(record) <= slo.e2e)
    )
