"""Single rules of the scheduling core, each on the smallest example that shows it."""

import numpy as np
import pytest

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.inflight import MAX_RUN_AHEAD, ResultMismatchError, RunAhead
from scheduler_service.core.invariants import IntegrityError, check_integrity
from scheduler_service.core.request import FinishReason
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.step_plan import EXPLICIT, SAMPLE, StepResult, StepTimings
from tests.core.builders import GREEDY, capacity, request, schedule, settle


def test_prefill_is_chunked_and_batches_are_mixed() -> None:
    scheduler = Scheduler(capacity(max_batched_tokens=8), run_ahead=1)
    scheduler.add_request(request(0, [1, 2, 3]))
    settle(scheduler, schedule(scheduler), [7])
    scheduler.add_request(request(1, list(range(100, 110))))
    first = schedule(scheduler)
    assert first.num_tokens.tolist() == [1, 7]
    assert first.flags.tolist() == [SAMPLE, EXPLICIT]
    settle(scheduler, first, [8])
    second = schedule(scheduler)
    assert second.num_tokens.tolist() == [1, 3]
    assert second.flags.tolist() == [SAMPLE, EXPLICIT | SAMPLE]
    assert second.prefill_token_ids.tolist() == [107, 108, 109]


def test_run_ahead_plans_decodes_without_knowing_their_tokens() -> None:
    scheduler = Scheduler(capacity(), run_ahead=3)
    scheduler.add_request(request(0, [1, 2]))
    plans = [schedule(scheduler) for _ in range(3)]
    assert scheduler.schedule(0.0) is None
    assert [plan.start_positions.tolist() for plan in plans] == [[0], [2], [3]]
    assert [len(plan.prefill_token_ids) for plan in plans] == [2, 0, 0]


def test_length_is_known_at_dispatch_and_wastes_nothing() -> None:
    scheduler = Scheduler(capacity(), run_ahead=8)
    scheduler.add_request(request(0, [1, 2], max_tokens=3))
    plans = [schedule(scheduler) for _ in range(3)]
    assert scheduler.schedule(0.0) is None
    ends = [end for plan in plans for end in settle(scheduler, plan, [5]).finished]
    assert [end.reason for end in ends] == [FinishReason.LENGTH]


def test_a_stop_id_wastes_only_rows_in_flight() -> None:
    scheduler = Scheduler(capacity(), run_ahead=3)
    scheduler.add_request(request(0, [1, 2], max_tokens=20, stop_token_ids=(9,)))
    plans = [schedule(scheduler) for _ in range(3)]
    assert [end.reason for end in settle(scheduler, plans[0], [9]).finished] == [FinishReason.STOP]
    assert scheduler.kv.pool.num_used == 0
    for plan in plans[1:]:
        assert len(settle(scheduler, plan, [4]).handles) == 0
    assert scheduler.stats.stale_tokens == 2


def test_tokens_are_counted_when_their_step_is_answered() -> None:
    scheduler = Scheduler(capacity(), run_ahead=2)
    scheduler.add_request(request(0, [1, 2, 3], max_tokens=20))
    plans = [schedule(scheduler) for _ in range(2)]
    counted = []
    for plan in plans:
        counted.append((scheduler.stats.computed_tokens, scheduler.stats.sampled_tokens))
        settle(scheduler, plan, [4])
    counted.append((scheduler.stats.computed_tokens, scheduler.stats.sampled_tokens))
    assert counted == [(0, 0), (3, 1), (4, 2)]


def test_a_burst_shares_its_prefix_after_one_plan() -> None:
    scheduler = Scheduler(capacity(), run_ahead=2)
    prefix = list(range(1, 13))
    for handle in range(3):
        scheduler.add_request(request(handle, [*prefix, 50 + handle]))
    first = schedule(scheduler)
    assert first.num_tokens.tolist() == [13]
    second = schedule(scheduler)
    assert second.num_tokens.tolist() == [1, 1, 1]
    assert scheduler.stats.prefix_hit_tokens == 24
    assert second.start_positions.tolist() == [13, 12, 12]


def test_a_full_hit_still_computes_a_token() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    for handle in range(2):
        scheduler.add_request(request(handle, list(range(8)), max_tokens=1))
        plan = schedule(scheduler)
        settle(scheduler, plan, [3])
    assert plan.start_positions.tolist() == [4]
    assert plan.num_tokens.tolist() == [4]


def test_generated_blocks_are_hit_once_settled() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1, 2], max_tokens=8))
    output = [settle(scheduler, schedule(scheduler), [token]).token_ids.tolist()[0] for token in range(10, 18)]
    scheduler.add_request(request(1, [1, 2, *output]))
    assert schedule(scheduler).start_positions.tolist() == [8]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    scheduler = Scheduler(capacity(num_blocks=4, block_size=4), run_ahead=1)
    scheduler._admissions.reserve = lambda num_leaving=0: 0  # type: ignore[method-assign]
    old, young = request(0, [1, 2, 3, 4, 5, 6, 7], max_tokens=8), request(1, [11, 12, 13, 14, 15, 16], max_tokens=8)
    scheduler.add_request(old)
    scheduler.add_request(young)
    streams: dict[int, list[int]] = {0: [], 1: []}
    for step in range(40):
        plan = scheduler.schedule(0.0)
        if plan is None:
            break
        samples = int(np.count_nonzero(plan.flags & SAMPLE))
        outputs = settle(scheduler, plan, [100 + step] * samples)
        for handle, token in zip(outputs.handles.tolist(), outputs.token_ids.tolist(), strict=True):
            streams[handle].append(token)
        check_integrity(scheduler)
    assert scheduler.stats.preemptions >= 1
    assert [len(stream) for stream in streams.values()] == [8, 8]
    assert streams[0] == list(range(100, 108))  # the oldest never stalls


def test_bad_logits_fail_only_their_request() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1, 2]))
    scheduler.add_request(request(1, [3, 4]))
    plan = schedule(scheduler)
    outputs = scheduler.settle(StepResult(plan.step_id, np.array([5, 0], np.int32), np.array([0, 1], np.uint8)))
    assert outputs.handles.tolist() == [0]
    assert [(end.handle, end.reason) for end in outputs.finished] == [(1, FinishReason.ERROR)]
    assert schedule(scheduler).rows.tolist() == [plan.rows[0]]
    check_integrity(scheduler)


def test_results_that_do_not_fit_are_refused_and_change_nothing() -> None:
    scheduler = Scheduler(capacity(), run_ahead=2)
    scheduler.add_request(request(0, [1, 2]))
    schedule(scheduler)
    for step_id, tokens in ((2, [1]), (1, [1, 2]), (1, []), (1, [1000]), (1, [-1])):
        with pytest.raises(ResultMismatchError):
            scheduler.settle(StepResult(step_id, np.array(tokens, np.int32)))
    check_integrity(scheduler)
    assert scheduler.settle(StepResult(1, np.array([7], np.int32))).token_ids.tolist() == [7]


def test_run_ahead_grows_when_starved_and_shrinks_when_plans_pile_up() -> None:
    window = RunAhead(None)
    for _ in range(20):
        window.observe(StepTimings(starved_us=50), after_idle=False)
    assert window.depth == MAX_RUN_AHEAD
    for _ in range(64):
        window.observe(StepTimings(plans_queued=3), after_idle=False)
    assert window.depth == MAX_RUN_AHEAD - 1
    depth = window.depth
    for _ in range(200):
        window.observe(StepTimings(starved_us=50), after_idle=True)
        window.observe(StepTimings(plans_queued=0), after_idle=False)
    assert window.depth == depth


def test_a_fixed_run_ahead_stays() -> None:
    window = RunAhead(1)
    for _ in range(10):
        window.observe(StepTimings(starved_us=50), after_idle=False)
    assert window.depth == 1


def test_what_can_never_fit_is_rejected_at_once() -> None:
    cluster = Cluster(2)
    cluster.executor_ready("a", capacity(num_blocks=4, block_size=4), 0.0)
    prompt = np.arange(10, dtype=np.int32)
    assert cluster.add_request(0, prompt, 7, GREEDY, 0.0) is None
    too_long = cluster.add_request(1, prompt, 8, GREEDY, 0.0)
    assert too_long is not None and too_long.reason is FinishReason.REJECTED
    assert cluster.add_request(2, prompt, 1, GREEDY, 0.0) is None
    overloaded = cluster.add_request(3, prompt, 1, GREEDY, 0.0)
    assert overloaded is not None and overloaded.reason is FinishReason.OVERLOADED


def test_requests_go_to_the_least_loaded_executor() -> None:
    cluster = Cluster(100)
    cluster.executor_ready("a", capacity(max_rows=8), 0.0)
    cluster.executor_ready("b", capacity(max_rows=4), 0.0)
    for handle in range(6):
        cluster.add_request(handle, np.array([handle], np.int32), 4, GREEDY, 0.0)
    cluster.schedule("a", 0.0)
    assert [s.num_running + s.num_waiting for s in cluster.executors.values()] == [4, 2]


def test_requests_without_an_executor_expire() -> None:
    cluster = Cluster(100)
    cluster.executor_ready("a", capacity(), 0.0)
    cluster.add_request(0, np.array([1], np.int32), 4, GREEDY, 0.0)
    cluster.schedule("a", 0.0)
    assert cluster.executor_lost("a", now=100.0).num_requeued == 1
    assert cluster.expire(now=129.0, timeout=30.0) == []
    assert [end.reason for end in cluster.expire(now=131.0, timeout=30.0)] == [FinishReason.UNAVAILABLE]
    assert cluster.num_requests == 0


def test_the_integrity_check_sees_a_leak() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1, 2]))
    schedule(scheduler)
    check_integrity(scheduler)
    scheduler.kv.pool.ref_count[scheduler.rows.blocks(0)] += 1
    with pytest.raises(IntegrityError):
        check_integrity(scheduler)


@pytest.mark.parametrize(("generated", "hit"), [(9, 8), (10, 12)])
def test_what_a_request_has_generated_can_be_hit_once_it_has_left_its_row(generated: int, hit: int) -> None:
    scheduler = Scheduler(capacity(), run_ahead=3)
    scheduler.add_request(request(0, [1, 2], max_tokens=50, stop_token_ids=(99,)))
    plans = [schedule(scheduler) for _ in range(3)]
    for token in range(10, 10 + generated):
        settle(scheduler, plans.pop(0), [token])
        plans.append(schedule(scheduler))
    settle(scheduler, plans.pop(0), [99])
    # Two steps in flight still write behind the stop id, in the first case to the end of a block.
    scheduler.add_request(request(1, [1, 2, *range(10, 10 + generated), 99, 5]))
    assert schedule(scheduler).start_positions.tolist() == [hit]
    check_integrity(scheduler)


def test_tokens_in_flight_have_no_digest_yet() -> None:
    scheduler = Scheduler(capacity(), run_ahead=8)
    scheduler.add_request(request(0, [1, 2], max_tokens=50))
    plans = [schedule(scheduler) for _ in range(8)]
    settle(scheduler, plans[0], [10])
    settle(scheduler, plans[1], [11])
    settle(scheduler, plans[2], [12])
    scheduler.vacate_rows(lambda _: True)
    for plan in plans[3:]:
        settle(scheduler, plan, [13])
        check_integrity(scheduler)


def test_what_a_request_with_bad_logits_has_generated_is_never_hit() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1, 2], max_tokens=50))
    for token in range(10, 16):
        settle(scheduler, schedule(scheduler), [token])
    plan = schedule(scheduler)
    scheduler.settle(StepResult(plan.step_id, np.array([0], np.int32), np.array([1], np.uint8)))
    scheduler.add_request(request(1, [1, 2, *range(10, 16), 5]))
    assert schedule(scheduler).start_positions.tolist() == [0]
    check_integrity(scheduler)


@pytest.mark.parametrize("heir_runs", [True, False])
def test_what_a_failed_row_has_published_is_not_hit_any_more(heir_runs: bool) -> None:
    """Nor what others have computed on top of it; those that run there go on."""
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1, 2, 3, 4, 9], max_tokens=1))
    settle(scheduler, schedule(scheduler), [7])
    root = scheduler.kv.cache.items()
    prompt = [1, 2, 3, 4, *range(20, 28), 5]
    scheduler.add_request(request(1, prompt, max_tokens=20))
    settle(scheduler, schedule(scheduler), [7])
    heir = request(2, [*prompt[:12], *range(30, 35)], max_tokens=20 if heir_runs else 1)
    scheduler.add_request(heir)
    settle(scheduler, schedule(scheduler), [7, 7])
    assert len(scheduler.kv.cache.items()) == 4
    plan = schedule(scheduler)
    status = np.array([1] + [0] * (len(plan.rows) - 1), np.uint8)
    result = StepResult(plan.step_id, np.full(len(plan.rows), 7, np.int32), row_status=status)
    assert [(end.handle, end.reason) for end in scheduler.settle(result).finished] == [(1, FinishReason.ERROR)]
    assert scheduler.kv.cache.items() == root
    check_integrity(scheduler)
    retry = request(3, prompt, max_tokens=20)
    scheduler.add_request(retry)
    plan = schedule(scheduler)
    assert plan.start_positions[-1] == 4
    settle(scheduler, plan, [7] * len(plan.rows))
    assert len(scheduler.kv.cache.items()) == 3
    check_integrity(scheduler)
    if heir_runs:
        scheduler.abort(heir)
        assert len(scheduler.kv.cache.items()) == 3
    scheduler.abort(retry)
    check_integrity(scheduler)
    assert scheduler.kv.pool.num_used == 0
