"""The workloads are what their titles say, and fresh in every run."""

from benchmarks.workloads import WORKLOADS


def _sizes(name: str) -> tuple[int, int, int]:
    requests = [request for burst in WORKLOADS[name].bursts(0) for request in burst]
    return len(requests), sum(len(one.prompt) for one in requests), sum(one.max_tokens for one in requests)


def test_sizes_are_the_published_ones() -> None:
    assert {name: _sizes(name) for name in WORKLOADS} == {
        "W1": (64, 8959, 5385),
        "W1-16": (16, 2194, 1158),
        "W2": (1, 32, 128),
        "W3": (1, 1024, 1),
        "W4": (32, 17408, 512),
        "W4w": (32, 17408, 512),
    }


def test_contents_differ_between_runs_and_lengths_do_not() -> None:
    for workload in WORKLOADS.values():
        one, other = ([request for burst in workload.bursts(run) for request in burst] for run in (0, 1))
        assert [len(a.prompt) for a in one] == [len(b.prompt) for b in other]
        assert all(a.prompt[:16] != b.prompt[:16] for a, b in zip(one, other, strict=True))
        assert workload.bursts(0) == workload.bursts(0)


def test_first_request_of_w4w_goes_alone() -> None:
    assert [len(burst) for burst in WORKLOADS["W4w"].bursts(0)] == [1, 31]
