"""What happens to requests when executors die, leave or join."""

import numpy as np
import pytest

from scheduler_service.core.cluster import Cluster, ExecutorState
from scheduler_service.core.invariants import check_cluster
from scheduler_service.core.request import FinishReason, SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity, Scheduler
from scheduler_service.core.step_plan import SAMPLE, StepPlan, StepResult
from scheduler_service.core.suspicion import DeathRecord
from tests.core.builders import GREEDY, capacity, request, schedule, settle
from tests.core.world import World
from tests.fakes.shadow_executor import POISON, ShadowExecutor

VOCAB = 1000


def cluster_of(*names: str, run_ahead: int | None = 1, **limits: int) -> Cluster:
    cluster = Cluster(1000, run_ahead)
    for name in names:
        cluster.executor_ready(name, capacity(**limits), 0.0)
    return cluster


def submit(cluster: Cluster, handle: int, prompt: list[int], max_tokens: int = 20, salt: bytes = b"") -> None:
    end = cluster.add_request(handle, np.array(prompt, np.int32), max_tokens, GREEDY, 0.0, cache_salt=salt)
    assert end is None


def run(cluster: Cluster, name: str, steps: int = 1) -> StepPlan | None:
    """So many steps of an executor that samples 7 all the time; the last plan."""
    plan = None
    for _ in range(steps):
        plan = cluster.schedule(name, 0.0)
        if plan is None:
            return None
        samples = int(np.count_nonzero(plan.flags & SAMPLE))
        cluster.settle(name, StepResult(plan.step_id, np.full(samples, 7, np.int32)))
    return plan


# ------------------------------------------------------------------------------ audits


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


# ----------------------------------------------------------------------------- poison


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


# ----------------------------------------------------------------- losses and the cache


def test_nothing_that_was_not_settled_is_hit_after_a_fault() -> None:
    cluster = cluster_of("a", run_ahead=4)
    prompt = list(range(1, 10))
    submit(cluster, 0, prompt)
    assert cluster.schedule("a", 0.0) is not None  # publishes its blocks; the executor dies before it writes them
    cluster.executor_lost("a", 0.0)
    cluster.executor_ready("a", capacity(), 0.0)
    assert cluster.executors["a"].kv.cache.items() == []
    plan = cluster.schedule("a", 0.0)
    assert plan is not None and plan.start_positions.tolist() == [0]


def test_salts_do_not_share_prefixes() -> None:
    cluster = cluster_of("a")
    prompt = list(range(1, 10))
    submit(cluster, 0, prompt, salt=b"a" * 32)
    run(cluster, "a")
    submit(cluster, 1, prompt, salt=b"b" * 32)
    submit(cluster, 2, prompt, salt=b"a" * 32)
    plan = run(cluster, "a")
    assert plan is not None
    starts = dict(
        zip(cluster.executors["a"].rows.handle[plan.rows].tolist(), plan.start_positions.tolist(), strict=True)
    )
    assert (starts[1], starts[2]) == (0, 8)


def test_lost_output_is_computed_again_in_small_portions_while_others_decode() -> None:
    limits = {"max_batched_tokens": 16, "max_model_len": 200, "num_blocks": 200}
    cluster = cluster_of("a", "b", **limits)
    submit(cluster, 0, [1] * 40, max_tokens=40)
    run(cluster, "a", steps=12)
    submit(cluster, 1, [2], max_tokens=100)
    run(cluster, "b")
    cluster.executor_lost("a", 0.0)
    shares = []
    while (plan := run(cluster, "b")) is not None and plan.num_tokens.max() > 1:
        shares.append(int(plan.num_tokens.max()))
    assert set(shares[:-1]) == {4}
    assert sum(shares) >= 40


# ----------------------------------------------------------- drain, pause, join, routing


def test_a_drained_executors_requests_go_on_elsewhere_at_the_next_token() -> None:
    cluster = cluster_of("a", "b", run_ahead=3)
    submit(cluster, 0, [1, 2, 3])
    plans = [cluster.schedule("a", 0.0) for _ in range(3)]
    cluster.drain_executor("a")
    assert cluster.schedule("a", 0.0) is None
    assert cluster.num_serving == 1 and not cluster.is_drained("a")
    tokens = []
    for plan in plans:
        assert plan is not None
        tokens += cluster.settle("a", StepResult(plan.step_id, np.array([7], np.int32))).token_ids.tolist()
    assert tokens == [7, 7, 7]  # nothing in flight is thrown away
    assert cluster.schedule("a", 0.0) is None
    check_cluster(cluster)
    assert cluster.is_drained("a")
    plan = cluster.schedule("b", 0.0)
    assert plan is not None and plan.prefill_token_ids.tolist() == [1, 2, 3, 7, 7, 7]
    assert cluster.executor_lost("a", 0.0).num_requeued == 0


def test_a_sole_executor_finishes_what_it_has_until_another_joins() -> None:
    cluster = cluster_of("a")
    submit(cluster, 0, [1, 2], max_tokens=50)
    run(cluster, "a")
    cluster.drain_executor("a")
    submit(cluster, 1, [3, 4])
    plan = run(cluster, "a")
    assert plan is not None and len(plan.rows) == 1
    assert cluster.num_queued == 1
    cluster.executor_ready("b", capacity(), 0.0)
    assert run(cluster, "a") is None
    assert cluster.is_drained("a")
    plan = run(cluster, "b")
    assert plan is not None and len(plan.rows) == 2


def test_requests_too_large_for_others_stay_on_a_draining_executor() -> None:
    cluster = cluster_of("a")
    cluster.executor_ready("small", capacity(num_blocks=4), 0.0)
    submit(cluster, 0, list(range(1, 30)), max_tokens=3)
    run(cluster, "a")
    cluster.drain_executor("a")
    assert run(cluster, "a", steps=2) is not None
    assert cluster.num_requests == 0 and cluster.is_drained("a")


def test_a_paused_executor_keeps_what_runs_and_gets_nothing_new() -> None:
    cluster = cluster_of("a", max_rows=1)
    submit(cluster, 0, [1])
    submit(cluster, 1, [2])
    run(cluster, "a")
    cluster.pause_executor("a")
    plan = run(cluster, "a")
    assert plan is not None and len(plan.rows) == 1
    cluster.executor_ready("b", capacity(), 0.0)
    plan = run(cluster, "b")
    assert plan is not None and plan.prefill_token_ids.tolist() == [2]  # it had waited on the paused one
    submit(cluster, 2, [3])
    assert run(cluster, "b") is not None
    cluster.resume_executor("a")
    assert cluster.state("a") is ExecutorState.SERVING


def test_waiting_requests_go_to_an_executor_that_joins() -> None:
    cluster = cluster_of("a", max_rows=2)
    for handle in range(6):
        submit(cluster, handle, [1 + handle])
    run(cluster, "a")
    cluster.executor_ready("b", capacity(max_rows=2), 0.0)
    plan = run(cluster, "b")
    assert plan is not None and len(plan.rows) == 2


def test_waiting_requests_go_to_an_executor_that_becomes_idle() -> None:
    cluster = cluster_of("a", "b", max_rows=1)
    for handle in range(4):
        submit(cluster, handle, [1 + handle], max_tokens=1 if handle in (1, 3) else 50)
    run(cluster, "a")
    run(cluster, "b", steps=3)
    assert cluster.executors["b"].num_running == 0 and cluster.executors["a"].num_waiting == 1
    cluster.rebalance(0.0)
    plan = run(cluster, "b")
    assert plan is not None and plan.prefill_token_ids.tolist() == [3]


def test_requests_go_where_their_prefix_is_while_loads_are_alike() -> None:
    cluster = cluster_of("a", "b", max_rows=8)
    prefix = list(range(1, 13))
    submit(cluster, 0, prefix, max_tokens=1)
    run(cluster, "a")  # both are idle: the first of equals
    submit(cluster, 1, [50])
    cluster.schedule("a", 0.0)  # a little load for the one that has the prefix
    for handle in range(2, 8):
        submit(cluster, handle, [*prefix, 60 + handle])
    cluster.schedule("b", 0.0)
    loads = [one.num_running + one.num_waiting for one in cluster.executors.values()]
    assert sum(loads) == 7
    assert loads[0] > loads[1] >= 1  # until it would be too much busier than the other


def test_a_block_size_of_its_own_does_not_confuse_the_cache() -> None:
    cluster = cluster_of("a", block_size=4)
    prompt = list(range(1, 18))
    submit(cluster, 0, prompt)
    run(cluster, "a", steps=2)
    cluster.executor_lost("a", 0.0)
    cluster.executor_ready("b", capacity(block_size=8), 0.0)
    run(cluster, "b")
    submit(cluster, 1, prompt)
    plan = run(cluster, "b")
    assert plan is not None and plan.start_positions.max() == 19 and plan.start_positions.min() == 16
