"""A slice of the kill test: executors and schedulers die under load, and no caller gets anything else than without."""

import asyncio

import pytest

from baton.checkpoints import TINY_PYTHON
from benchmarks.kill_test.cases import PARAMETERS, Case, cases
from benchmarks.kill_test.cluster import KillableCluster, Settings
from benchmarks.kill_test.run import Plan, run
from benchmarks.kill_test.verdict import Verdict

EVERYTHING = cases(72)
ONE_OF_EACH = EVERYTHING[: len(PARAMETERS)]
SEED = 20261121


def settings(schedulers: int = 1, executors: int = 3, *, proxies: bool = False, loss: float = 0.0) -> Settings:
    return Settings(
        model=TINY_PYTHON,
        schedulers=schedulers,
        executors=executors,
        num_blocks=1000,
        max_rows=32,
        proxies=proxies,
        loss=loss,
    )


def verdict(where: Settings, asked: list[Case], streams: int, faults: int, *kinds: str) -> Verdict:
    with KillableCluster(where) as cluster:
        found, refused = asyncio.run(run(cluster, Plan(asked, streams, faults, kinds, concurrency=40, seed=SEED)))
    assert not refused, "every set of parameters is to be tested"
    return found


def assert_unnoticed(found: Verdict, streams: int) -> None:
    assert (found.failed, found.mismatched) == (0, 0), (found.errors, found.mismatches)
    assert found.streams == streams
    assert found.least_tokens >= 64


def test_streams_are_the_same_when_executors_are_killed() -> None:
    found = verdict(settings(), EVERYTHING, 200, 10, "kill")
    assert_unnoticed(found, 200)
    assert found.faults["kill"] >= 3
    assert found.interrupted >= 20


@pytest.mark.parametrize("kind", ["stop", "hang", "term", "cut", "silence"])
def test_streams_are_the_same_when_executors_freeze_leave_or_are_cut_off(kind: str) -> None:
    found = verdict(settings(proxies=kind in {"cut", "silence"}), ONE_OF_EACH, 110, 2, kind)
    assert_unnoticed(found, 110)
    assert found.faults[kind] >= 1
    assert found.interrupted >= 4


def test_streams_are_the_same_when_messages_are_lost() -> None:
    found = verdict(settings(proxies=True, loss=0.05), ONE_OF_EACH, 66, 2, "kill", "term")
    assert_unnoticed(found, 66)
    assert found.interrupted >= 4


def test_streams_are_the_same_when_schedulers_are_killed() -> None:
    found = verdict(settings(schedulers=2, executors=4), EVERYTHING, 240, 3, "scheduler")
    assert_unnoticed(found, 240)
    assert found.faults["scheduler"] >= 1
    assert found.resumed >= 8
