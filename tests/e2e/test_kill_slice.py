"""A slice of the kill test: executors and schedulers die under load, and no caller gets anything else than without."""

import asyncio

import pytest

from baton.checkpoints import TINY_PYTHON
from benchmarks.kill_test.cases import cases
from benchmarks.kill_test.cluster import KillableCluster, Settings
from benchmarks.kill_test.run import Plan, run
from benchmarks.kill_test.verdict import Verdict

MAX_TOKENS = 72


def settings(schedulers: int = 1, executors: int = 3, *, proxies: bool = False) -> Settings:
    return Settings(
        model=TINY_PYTHON,
        schedulers=schedulers,
        executors=executors,
        api_processes=1,
        num_blocks=1000,
        max_rows=32,
        log_level="error",
        proxies=proxies,
        delay=0.0,
    )


def verdict(cluster_settings: Settings, streams: int, faults: int, *kinds: str) -> Verdict:
    plan = Plan(cases(MAX_TOKENS), streams, faults, kinds, concurrency=40, seed=20261121)
    with KillableCluster(cluster_settings) as cluster:
        found, refused = asyncio.run(run(cluster, plan))
    assert not refused, "every set of parameters is to be tested"
    return found


def assert_unnoticed(found: Verdict, streams: int) -> None:
    assert (found.failed, found.mismatched) == (0, 0), (found.errors, found.mismatches)
    assert found.streams == streams
    assert found.least_tokens >= 64


def test_streams_are_the_same_when_executors_are_killed() -> None:
    found = verdict(settings(), 160, 10, "kill")
    assert_unnoticed(found, 160)
    assert found.faults["kill"] >= 3
    assert found.interrupted >= 20


@pytest.mark.parametrize("kind", ["stop", "term", "cut", "silence"])
def test_streams_are_the_same_when_executors_freeze_leave_or_are_cut_off(kind: str) -> None:
    found = verdict(settings(proxies=kind in {"cut", "silence"}), 120, 2, kind)
    assert_unnoticed(found, 120)
    assert found.faults[kind] >= 1
    assert found.interrupted >= 4


def test_streams_are_the_same_when_schedulers_are_killed() -> None:
    found = verdict(settings(schedulers=2, executors=4), 240, 3, "scheduler")
    assert_unnoticed(found, 240)
    assert found.faults["scheduler"] >= 1
    assert found.resumed >= 8
