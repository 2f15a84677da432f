"""Tokens that are computed again are sampled again, and streams that may differ are named."""

import numpy as np
import pytest

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.scheduler import ExecutorCapacity, Scheduler
from scheduler_service.core.step_plan import StepResult
from tests.core.builders import GREEDY, capacity, request, schedule, settle
from tests.core.clusters import VOCAB, cluster_of, run, submit
from tests.fakes.shadow_executor import ShadowExecutor


def test_the_last_tokens_are_audited_where_they_are_computed_again() -> None:
    cluster = cluster_of("a", max_model_len=1000, num_blocks=500, max_batched_tokens=500)
    submit(cluster, 0, [1, 2, 3], max_tokens=200)
    run(cluster, "a", steps=100)
    cluster.executor_lost("a", 0.0)
    cluster.executor_ready("b", capacity(max_model_len=1000, num_blocks=500, max_batched_tokens=500), 0.0)
    plan = cluster.schedule("b", 0.0)
    assert plan is not None
    (admission,) = plan.admissions
    assert admission.token_ids.tolist() == [1, 2, 3] + [7] * 100
    assert admission.audit_from == 103 - 64


def test_tokens_that_a_caller_has_brought_are_not_audited() -> None:
    cluster = cluster_of("a")
    output = np.array([7, 8, 9], np.int32)
    assert cluster.add_request(0, np.array([1, 2], np.int32), 20, GREEDY, 0.0, output_token_ids=output) is None
    run(cluster, "a", steps=2)
    cluster.executor_lost("a", 0.0)
    cluster.executor_ready("b", capacity(), 0.0)
    plan = cluster.schedule("b", 0.0)
    assert plan is not None and plan.admissions[0].audit_from == 5


def test_tokens_whose_logits_are_not_computed_again_are_not_audited() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1, 2, 3, 4]))
    settle(scheduler, schedule(scheduler), [5])
    scheduler.vacate_rows(lambda _: True)
    plan = schedule(scheduler)
    assert plan.start_positions.tolist() == [4]  # the prompt's block is in the cache
    assert plan.admissions[0].audit_from == 0
    assert plan.admissions[0].token_ids.tolist() == []


def test_other_tokens_than_were_sent_are_counted() -> None:
    cluster = cluster_of("a")
    prompt = [1, 2, 3]
    cluster.add_request(0, np.array(prompt, np.int32), 20, GREEDY, 0.0)
    good, skewed = ShadowExecutor(capacity()), ShadowExecutor(capacity(), skew=1)
    for _ in range(5):
        plan = cluster.schedule("a", 0.0)
        assert plan is not None
        cluster.settle("a", good.execute(plan))
    cluster.executor_lost("a", 0.0)
    cluster.executor_ready("b", capacity(), 0.0)
    plan = cluster.schedule("b", 0.0)
    assert plan is not None
    cluster.settle("b", skewed.execute(plan))
    stats = cluster.executors["b"].stats
    assert stats.audited_tokens == 5
    assert 0 < stats.audit_mismatches <= 5


@pytest.mark.parametrize(("first", "second", "is_exact"), [("x", "x", True), ("x", "y", False), (None, None, False)])
def test_streams_that_cannot_go_on_exactly_are_named_once(
    first: str | None, second: str | None, is_exact: bool
) -> None:
    def executor(arithmetic: str | None) -> ExecutorCapacity:
        return ExecutorCapacity(4, 32, 8, 64, 128, VOCAB, arithmetic)

    cluster = Cluster(10, run_ahead=1)
    cluster.executor_ready("a", executor(first), 0.0)
    submit(cluster, 5, [1, 2])
    run(cluster, "a", steps=2)
    cluster.executor_lost("a", 0.0)
    cluster.executor_ready("b", executor(second), 0.0)
    named = []
    for _ in range(3):
        plan = cluster.schedule("b", 0.0)
        assert plan is not None
        named += cluster.settle("b", StepResult(plan.step_id, np.array([7], np.int32))).best_effort_handles
    assert named == ([] if is_exact else [5])


@pytest.mark.parametrize("arithmetic", ["x", None])
def test_streams_begun_elsewhere_are_named_where_nothing_is_exact(arithmetic: str | None) -> None:
    cluster = Cluster(10, run_ahead=1)
    cluster.executor_ready("a", ExecutorCapacity(4, 32, 8, 64, 128, VOCAB, arithmetic), 0.0)
    prompt, output = np.array([1, 2], np.int32), np.array([3], np.int32)
    cluster.add_request(5, prompt, 10, GREEDY, 0.0, output_token_ids=output)
    cluster.add_request(6, prompt, 10, GREEDY, 0.0)
    plan = cluster.schedule("a", 0.0)
    assert plan is not None
    named = cluster.settle("a", StepResult(plan.step_id, np.array([7, 7], np.int32))).best_effort_handles
    assert named == ([5] if arithmetic is None else [])
