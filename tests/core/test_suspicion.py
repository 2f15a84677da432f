"""Requests that take executors down run alone, and end."""

import numpy as np
import pytest

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.invariants import check_cluster
from scheduler_service.core.request import FinishReason, SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import StepResult
from scheduler_service.core.suspicion import DeathRecord
from tests.core.builders import capacity
from tests.core.clusters import VOCAB, cluster_of, run, submit
from tests.core.world import World
from tests.fakes.shadow_executor import POISON


def test_progress_clears_suspicion() -> None:
    record = DeathRecord()
    record.note_death(10, in_flight=3)
    record.note_death(14, in_flight=2)
    assert not record.is_quarantined
    record.note_death(16, in_flight=2)
    assert record.is_quarantined and not record.is_condemned
    record.note_progress(18)
    assert record.is_quarantined
    record.note_progress(19)
    assert not record.is_quarantined


def test_a_prompt_that_kills_is_suspected_as_long_as_no_token_follows_it() -> None:
    record = DeathRecord()
    record.note_death(10, in_flight=0)
    record.note_death(10, in_flight=0)
    assert record.is_quarantined
    record.note_progress(11)
    assert not record.is_quarantined


def test_healthy_requests_are_not_suspected_where_executors_die_every_few_steps() -> None:
    """Each time the busiest one, as soon as its requests have got a token more than it had in flight."""
    limits = {"max_rows": 16, "max_model_len": 1000, "num_blocks": 2000, "max_batched_tokens": 500}
    cluster = cluster_of("a", "b", "c", run_ahead=2, **limits)
    for handle in range(12):
        submit(cluster, handle, [1 + handle], max_tokens=900)
    for _ in range(12):
        for name in cluster.executors:
            run(cluster, name, steps=4)
            for _ in range(2):
                cluster.schedule(name, 0.0)
        busiest = max(cluster.executors, key=lambda name: cluster.executors[name].num_running)
        assert not cluster.executor_lost(busiest, 0.0).failed
        assert not any(request.is_quarantined for request in cluster.queued_requests())
        for name, scheduler in cluster.executors.items():
            for step in scheduler.ledger.steps():
                cluster.settle(name, StepResult(step.step_id, np.full(step.num_samples, 7, np.int32)))
            run(cluster, name)  # the others take over what it had
        cluster.executor_ready(busiest, capacity(**limits), 0.0)


def test_nobody_survives_sixteen_deaths() -> None:
    record = DeathRecord()
    for count in range(1, 17):
        assert not record.is_condemned
        record.note_death(3 * count, in_flight=2)
    assert record.is_condemned


def test_poison_kills_three_executors_and_nobody_else() -> None:
    world = World(4, {name: ExecutorCapacity(4, 64, 8, 64, 64, VOCAB) for name in "abc"}, VOCAB)
    poison = world.submit([9, 9, 9], 30, SamplingParams(encoded=POISON))
    innocents = [world.submit([1 + i, 2, 3], 30, SamplingParams(seed=i)) for i in range(12)]
    deaths = 0
    while world.live():
        for name in "abc":
            executor = world.shadows[name]
            world.dispatch(name)
            deaths += world.shadows[name] is not executor
            world.settle(name)
            world.check()
    assert deaths == 3
    assert poison is not None
    end = world.callers[poison].end
    assert end is not None and end.reason is FinishReason.ERROR and "3 times" in end.message
    for handle in innocents:
        assert handle is not None
        finished = world.callers[handle].end
        assert finished is not None and finished.reason is FinishReason.LENGTH


def test_requests_that_were_not_in_flight_are_not_suspects() -> None:
    cluster = cluster_of("a", max_rows=1)
    submit(cluster, 0, [1])
    submit(cluster, 1, [2])
    for _ in range(2):
        assert cluster.schedule("a", 0.0) is not None
        cluster.executor_lost("a", 0.0)
        cluster.executor_ready("a", capacity(max_rows=1), 0.0)
    assert cluster.schedule("a", 0.0) is not None
    report = cluster.executor_lost("a", 0.0)
    assert [(end.handle, end.executor_losses) for end in report.failed] == [(0, 3)]
    assert report.num_requeued == 1


@pytest.mark.parametrize(("faulty_step", "suspects"), [(1, [0]), (2, [0, 1]), (3, [0, 1]), (None, [0, 1, 2])])
def test_steps_after_the_one_that_failed_make_nobody_a_suspect(faulty_step: int | None, suspects: list[int]) -> None:
    cluster = cluster_of("a", run_ahead=4)
    plans = []
    for handle in range(2):
        submit(cluster, handle, [1 + handle])
        plans.append(cluster.schedule("a", 0.0))
    cluster.hold(1, True)
    plans.append(cluster.schedule("a", 0.0))
    submit(cluster, 2, [3])
    plans.append(cluster.schedule("a", 0.0))
    assert [None if plan is None else len(plan.rows) for plan in plans] == [1, 2, 1, 2]
    requests = [cluster._requests[handle] for handle in range(3)]
    cluster.executor_lost("a", 0.0, faulty_step)
    assert [request.handle for request in requests if request.deaths is not None] == suspects


def test_a_suspect_runs_alone_until_it_has_made_progress() -> None:
    cluster = cluster_of("a", run_ahead=2)
    submit(cluster, 0, [1, 2])
    for _ in range(2):
        cluster.schedule("a", 0.0)
        cluster.executor_lost("a", 0.0)
        cluster.executor_ready("a", capacity(), 0.0)
    submit(cluster, 1, [3, 4])
    alone = 0
    for _ in range(10):
        plan = run(cluster, "a")
        assert plan is not None
        if len(plan.rows) == 2:
            break
        alone += cluster.executors["a"].rows.handle[plan.rows[0]] == 0
    assert len(plan.rows) == 2
    assert alone == 2  # one step was in flight


def suspect_on_b(run_ahead: int, stop_token_ids: tuple[int, ...] = ()) -> Cluster:
    """Request 0 has killed ``a`` twice and is about to run on ``b``, where request 1 has steps in flight."""
    cluster = Cluster(1000, run_ahead)
    for _ in range(2):
        cluster.executor_ready("a", capacity(), 0.0)
        if not cluster.num_requests:
            sampling = SamplingParams(stop_token_ids=stop_token_ids)
            assert cluster.add_request(0, np.array([1, 2], np.int32), 20, sampling, 0.0) is None
        for _ in range(run_ahead):
            assert cluster.schedule("a", 0.0) is not None
        cluster.executor_lost("a", 0.0)
    cluster.hold(0, True)
    cluster.executor_ready("b", capacity(), 0.0)
    submit(cluster, 1, [3, 4], max_tokens=60)
    assert cluster.schedule("b", 0.0) is not None
    cluster.hold(0, False)
    return cluster


def test_a_suspect_waits_until_nothing_else_is_in_flight() -> None:
    cluster = suspect_on_b(run_ahead=3)
    assert cluster.schedule("b", 0.0) is None
    cluster.settle("b", StepResult(1, np.array([7], np.int32)))
    plan = cluster.schedule("b", 0.0)
    assert plan is not None and plan.prefill_token_ids.tolist() == [1, 2]


def test_others_wait_until_nothing_of_a_suspect_is_in_flight() -> None:
    cluster = suspect_on_b(run_ahead=3)
    cluster.settle("b", StepResult(1, np.array([7], np.int32)))
    assert cluster.schedule("b", 0.0) is not None
    cluster.hold(0, True)  # it loses its row, with a step in flight
    assert cluster.schedule("b", 0.0) is None
    check_cluster(cluster)
    cluster.settle("b", StepResult(2, np.array([7], np.int32)))
    plan = cluster.schedule("b", 0.0)
    assert plan is not None and cluster.executors["b"].rows.handle[plan.rows].tolist() == [1]


def test_others_wait_until_nothing_of_an_aborted_suspect_is_in_flight() -> None:
    cluster = suspect_on_b(run_ahead=3)
    cluster.settle("b", StepResult(1, np.array([7], np.int32)))
    assert cluster.schedule("b", 0.0) is not None
    assert cluster.abort(0) is not None
    assert cluster.schedule("b", 0.0) is None
    assert cluster.executor_lost("b", 0.0).num_requeued == 1
    assert cluster._requests[1].deaths is None  # it had no part in it


def test_others_wait_until_nothing_of_a_suspect_that_has_ended_is_in_flight() -> None:
    cluster = suspect_on_b(run_ahead=3, stop_token_ids=(7,))
    cluster.settle("b", StepResult(1, np.array([7], np.int32)))
    assert cluster.schedule("b", 0.0) is not None and cluster.schedule("b", 0.0) is not None
    assert cluster.settle("b", StepResult(2, np.array([7], np.int32))).finished
    assert cluster.schedule("b", 0.0) is None
    cluster.settle("b", StepResult(3, np.array([7], np.int32)))
    plan = cluster.schedule("b", 0.0)
    assert plan is not None and cluster.executors["b"].rows.handle[plan.rows].tolist() == [1]


def test_suspects_leave_others_as_many_steps_as_they_take() -> None:
    cluster = suspect_on_b(run_ahead=8)
    cluster.settle("b", StepResult(1, np.array([7], np.int32)))
    turns = []
    for step in range(9):
        plan = run(cluster, "b")
        assert plan is not None
        turns += cluster.executors["b"].rows.handle[plan.rows].tolist()
        if step % 3 == 2:
            cluster.hold(0, True)
            cluster.hold(0, False)
    assert turns == [0, 0, 0, 1, 1, 1, 0, 0, 0]
