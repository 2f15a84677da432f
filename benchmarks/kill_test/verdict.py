"""What came of it: streams compared with the fault-free ones, and how long callers waited."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

from benchmarks.figures import percentile
from benchmarks.kill_test.cases import Case
from benchmarks.kill_test.faults import FaultRecord
from benchmarks.kill_test.streams import Output, Stream

_UNDER_WAY = 0.3  # seconds


@dataclass(frozen=True, slots=True)
class Verdict:
    """The figures of a run; times in seconds.

    Attributes:
        interrupted: streams that ran on a victim, summed up over faults.
        failed, mismatched: streams that ended with an error, or otherwise than without faults.
        stall_p50, stall_p99: of the interrupted streams, the time without news around the fault.
        longest_stalls: the longest one of each fault, by kind.
    """

    streams: int
    least_tokens: int
    faults: dict[str, int]
    faults_on_8_rows: int
    interrupted: int
    resumed: int
    failed: int
    mismatched: int
    inexact: int
    stall_p50: float | None
    stall_p99: float | None
    longest_stalls: dict[str, list[float]]
    errors: dict[str, int] = field(default_factory=dict)
    mismatches: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, object]:
        """For ``emit``."""
        return asdict(self)

    @property
    def is_clean(self) -> bool:
        """Nobody noticed anything but a pause."""
        return not self.failed and not self.mismatched


def judge(
    streams: Sequence[Stream], expected: Mapping[int, Output], cases: Sequence[Case], records: Sequence[FaultRecord]
) -> Verdict:
    """Compare ``streams`` with what their cases gave without faults."""
    good = [stream for stream in streams if stream.output is not None]
    wrong = mismatched(streams, expected)
    by_record = [(record, _stalls(record, streams)) for record in records]
    stalls = [stall for _, found in by_record for stall in found]
    longest: dict[str, list[float]] = {}
    for record, found in by_record:
        longest.setdefault(record.kind, []).append(round(max(found, default=0.0), 3))
    return Verdict(
        streams=len(streams),
        least_tokens=min((stream.tokens for stream in good), default=0),
        faults=dict(Counter(record.kind for record in records)),
        faults_on_8_rows=sum(record.rows >= 8 for record in records),
        interrupted=sum(record.rows for record in records),
        resumed=sum(stream.interruptions > 0 for stream in streams),
        failed=len(streams) - len(good),
        mismatched=len(wrong),
        inexact=sum(not stream.is_exact for stream in streams),
        stall_p50=percentile(stalls, 50),
        stall_p99=percentile(stalls, 99),
        longest_stalls=longest,
        errors=dict(Counter(stream.error for stream in streams if stream.error)),
        mismatches=dict(Counter(cases[stream.case].name for stream in wrong)),
    )


def mismatched(streams: Sequence[Stream], expected: Mapping[int, Output]) -> list[Stream]:
    """Those that ended well, but not as their cases do without faults."""
    return [one for one in streams if one.output is not None and one.output != expected[one.case]]


def _stalls(record: FaultRecord, streams: Sequence[Stream]) -> list[float]:
    """The longest silences that began before a fault or right after it: as many as streams ran on the victim.

    What had left the victim before the fault may still arrive after it.
    """
    gaps = []
    for stream in streams:
        if stream.times and stream.times[0] <= record.at <= stream.times[-1]:
            after = bisect_left(stream.times, record.at)
            until = bisect_right(stream.times, record.at + _UNDER_WAY)
            moments = stream.times[max(0, after - 1) : until + 1]
            gaps.append(max((later - earlier for earlier, later in pairwise(moments)), default=0.0))
    return sorted(gaps, reverse=True)[: record.rows]
