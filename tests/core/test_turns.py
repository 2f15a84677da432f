"""Who runs when: priorities, held requests, queue timeouts, resumed streams."""

import numpy as np

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.invariants import check_integrity
from scheduler_service.core.request import FinishReason, SamplingParams
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.step_plan import EXPLICIT, SAMPLE, StepResult
from tests.core.builders import GREEDY, capacity, request, schedule, settle


def step(scheduler: Scheduler, token_id: int = 5) -> list[int]:
    """One step from plan to result; the handles that got a token."""
    plan = schedule(scheduler)
    outputs = settle(scheduler, plan, [token_id] * int(np.count_nonzero(plan.flags & SAMPLE)))
    check_integrity(scheduler)
    handles: list[int] = outputs.handles.tolist()
    return handles


def test_a_lower_priority_number_is_admitted_first() -> None:
    scheduler = Scheduler(capacity(max_rows=1), run_ahead=1)
    for handle, priority in ((0, 3), (1, -1), (2, -1), (3, 0)):
        scheduler.add_request(request(handle, [1 + handle, 2], max_tokens=1, priority=priority))
    assert [step(scheduler) for _ in range(4)] == [[1], [2], [3], [0]]


def test_an_urgent_request_takes_the_row_of_the_least_urgent_youngest() -> None:
    scheduler = Scheduler(capacity(max_rows=3), run_ahead=1)
    for handle, priority in ((0, 0), (1, 5), (2, 5)):
        scheduler.add_request(request(handle, [1 + handle, 2], max_tokens=4, priority=priority))
    assert step(scheduler) == [0, 1, 2]
    scheduler.add_request(request(3, [9, 9], max_tokens=2, priority=1))
    assert sorted(step(scheduler)) == [0, 1, 3]
    assert sorted(step(scheduler)) == [0, 1, 3]
    assert sorted(step(scheduler)) == [0, 1, 2]  # back in the row of the one that has ended
    assert scheduler.stats.preemptions == 1


def test_equals_never_preempt_each_other() -> None:
    scheduler = Scheduler(capacity(max_rows=1), run_ahead=1)
    scheduler.add_request(request(0, [1], max_tokens=3, priority=2))
    step(scheduler)
    scheduler.add_request(request(1, [2], max_tokens=3, priority=2))
    assert [step(scheduler) for _ in range(3)] == [[0], [0], [1]]
    assert scheduler.stats.preemptions == 0


def test_nobody_is_preempted_for_a_request_that_would_not_fit_all_the_same() -> None:
    scheduler = Scheduler(capacity(num_blocks=8, block_size=4, max_rows=4), run_ahead=1)
    scheduler.add_request(request(0, list(range(1, 17)), max_tokens=8, priority=0))
    scheduler.add_request(request(1, [50, 51], max_tokens=8, priority=9))
    assert step(scheduler) == [0]
    scheduler.add_request(request(2, list(range(100, 124)), max_tokens=4, priority=1))
    for _ in range(4):
        assert step(scheduler)[0] == 0
    assert scheduler.stats.preemptions == 0


def test_an_urgent_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = Scheduler(capacity(max_batched_tokens=8), run_ahead=1)
    scheduler.add_request(request(0, list(range(1, 60)), max_tokens=2, priority=1))
    assert step(scheduler) == []
    scheduler.add_request(request(1, [90, 91, 92], max_tokens=2, priority=0))
    plan = schedule(scheduler)
    assert plan.num_tokens.tolist() == [3, 5]
    assert plan.flags.tolist() == [EXPLICIT | SAMPLE, EXPLICIT]


def test_an_urgent_request_does_not_wait_behind_full_executors() -> None:
    cluster = Cluster(1000)
    cluster.executor_ready("a", capacity(max_rows=1), 0.0)
    for handle in range(50):
        assert cluster.add_request(handle, np.array([1 + handle], np.int32), 4, GREEDY, 0.0, priority=5) is None
    assert cluster.schedule("a", 0.0) is not None
    assert cluster.num_queued > 0
    assert cluster.add_request(99, np.array([99], np.int32), 4, GREEDY, 0.0, priority=1) is None
    plan = cluster.schedule("a", 0.0)
    assert plan is not None and plan.prefill_token_ids.tolist() == [99]


def test_held_rows_are_not_scheduled_and_go_on_where_they_were() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    slow, other = request(0, [1, 2], max_tokens=4), request(1, [3, 4], max_tokens=9)
    scheduler.add_request(slow)
    scheduler.add_request(other)
    assert step(scheduler) == [0, 1]
    scheduler.set_held(slow, True)
    assert step(scheduler) == [1]
    scheduler.set_held(slow, False)
    assert sorted(step(scheduler)) == [0, 1]
    assert scheduler.stats.preemptions == 0


def test_a_prompt_can_be_held_between_its_chunks() -> None:
    scheduler = Scheduler(capacity(max_batched_tokens=8), run_ahead=1)
    slow = request(0, list(range(1, 13)), max_tokens=2)
    scheduler.add_request(slow)
    assert step(scheduler) == []
    scheduler.set_held(slow, True)
    assert scheduler.schedule(0.0) is None
    check_integrity(scheduler)
    scheduler.set_held(slow, False)
    assert step(scheduler) == [0]


def test_a_held_request_is_not_admitted() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    slow = request(0, [1, 2])
    scheduler.add_request(slow)
    scheduler.set_held(slow, True)
    assert scheduler.schedule(0.0) is None
    assert scheduler.num_waiting == 1
    scheduler.set_held(slow, False)
    assert step(scheduler) == [0]


def test_held_rows_make_room_for_whoever_waits() -> None:
    scheduler = Scheduler(capacity(max_rows=2), run_ahead=1)
    old, slow, late = (request(handle, [1 + handle], max_tokens=6) for handle in range(3))
    scheduler.add_request(old)
    scheduler.add_request(slow)
    assert step(scheduler) == [0, 1]
    scheduler.set_held(slow, True)
    scheduler.add_request(late)
    assert step(scheduler) == [0, 2]
    scheduler.set_held(slow, False)
    streams = [step(scheduler) for _ in range(9)]
    assert sum(stream.count(1) for stream in streams) == 5  # its sixth token was the first


def test_memory_is_taken_from_held_rows_first() -> None:
    scheduler = Scheduler(capacity(num_blocks=4, block_size=4), run_ahead=1)
    scheduler._admissions.reserve = lambda num_leaving=0: 0  # type: ignore[method-assign]
    old, young = request(0, [1, 2, 3, 4, 5, 6, 7], max_tokens=8), request(1, [11, 12, 13, 14, 15, 16], max_tokens=8)
    scheduler.add_request(old)
    scheduler.add_request(young)
    step(scheduler)
    scheduler.set_held(old, True)
    for _ in range(6):
        assert step(scheduler) == [1]
    assert old.row < 0 and scheduler.stats.preemptions == 1


def test_a_request_that_does_not_start_in_time_ends() -> None:
    cluster = Cluster(100)
    cluster.executor_ready("a", capacity(max_rows=1), 0.0)
    prompt = np.array([1], np.int32)
    for handle, timeout in ((0, 1.0), (1, 2.0), (2, 0.0)):
        assert cluster.add_request(handle, prompt, 4, GREEDY, 10.0, queue_timeout=timeout) is None
    assert cluster.schedule("a", 10.5) is not None
    assert cluster.expire_unstarted(11.9) == []  # the first has started
    ends = cluster.expire_unstarted(12.0)
    assert [(end.handle, end.reason, end.queue_us) for end in ends] == [(1, FinishReason.UNAVAILABLE, 0)]
    assert cluster.num_requests == 2


def test_its_own_limit_replaces_the_clusters() -> None:
    cluster = Cluster(100)
    cluster.executor_ready("a", capacity(), 0.0)
    cluster.executor_lost("a", 0.0)
    prompt = np.array([1], np.int32)
    for handle, timeout in ((0, 60.0), (1, 0.0)):
        assert cluster.add_request(handle, prompt, 4, GREEDY, 0.0, queue_timeout=timeout) is None
    assert [end.handle for end in cluster.expire(31.0, 30.0)] == [1]
    assert [end.handle for end in cluster.expire_unstarted(60.0)] == [0]


def test_the_time_in_the_queue_is_reported_once_it_is_over() -> None:
    cluster = Cluster(100, run_ahead=1)
    cluster.executor_ready("a", capacity(), 0.0)
    cluster.add_request(0, np.array([1], np.int32), 2, GREEDY, 10.0)
    scheduler = cluster.executors["a"]
    assert cluster.schedule("a", 10.25) is not None
    cluster.executor_lost("a", 11.0)
    cluster.executor_ready("a", capacity(), 12.0)
    scheduler = cluster.executors["a"]
    ends = []
    while (plan := cluster.schedule("a", 20.0)) is not None:
        ends += settle(scheduler, plan, [3]).finished
    assert [(end.queue_us, end.executor_losses) for end in ends] == [(250_000, 1)]


def test_output_that_exists_counts_and_is_computed_with_the_prompt() -> None:
    cluster = Cluster(100, run_ahead=1)
    cluster.executor_ready("a", capacity(), 0.0)
    output = np.array([7, 8, 9], np.int32)
    assert cluster.add_request(0, np.array([1, 2], np.int32), 5, GREEDY, 0.0, output_token_ids=output) is None
    plan = cluster.schedule("a", 0.0)
    assert plan is not None
    assert plan.prefill_token_ids.tolist() == [1, 2, 7, 8, 9]
    assert plan.admissions[0].num_prompt_tokens == 2
    assert plan.admissions[0].audit_from == 0  # what a caller brings is not ours to vouch for
    tokens = 0
    ends = settle(cluster.executors["a"], plan, [4]).finished
    while not ends:
        tokens += 1
        ends = settle(cluster.executors["a"], schedule(cluster.executors["a"]), [4]).finished
    assert (tokens, ends[0].reason) == (1, FinishReason.LENGTH)


def test_output_that_is_complete_ends_at_once() -> None:
    cluster = Cluster(100)
    cluster.executor_ready("a", capacity(), 0.0)
    prompt, output = np.array([1, 2], np.int32), np.array([7, 8], np.int32)
    stopping = SamplingParams(stop_token_ids=(8,))
    for sampling, max_tokens, reason in ((stopping, 9, FinishReason.STOP), (GREEDY, 2, FinishReason.LENGTH)):
        end = cluster.add_request(0, prompt, max_tokens, sampling, 0.0, output_token_ids=output)
        assert end is not None and end.reason is reason
    assert cluster.num_requests == 0


def test_a_stop_id_ends_nothing_before_min_tokens() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    sampling = SamplingParams(stop_token_ids=(9,), min_tokens=2)
    scheduler.add_request(request(0, [1, 2], max_tokens=9, sampling=sampling))
    ends = [settle(scheduler, schedule(scheduler), [9]).finished for _ in range(3)]
    assert [len(end) for end in ends] == [0, 0, 1]
    assert (ends[2][0].reason, ends[2][0].stop_token_id) == (FinishReason.STOP, 9)


def test_any_number_of_held_requests_keeps_nobody_out() -> None:
    cluster = Cluster(1000, run_ahead=1)
    cluster.executor_ready("a", capacity(max_rows=1), 0.0)
    for handle in range(100):
        assert cluster.add_request(handle, np.array([1 + handle], np.int32), 4, GREEDY, 0.0) is None
        cluster.take_due()
        cluster.hold(handle, True)
    assert cluster.executors["a"].num_waiting == 100
    assert cluster.add_request(100, np.array([500], np.int32), 4, GREEDY, 0.0) is None
    plan = cluster.schedule("a", 0.0)
    assert plan is not None and plan.prefill_token_ids.tolist() == [500]


def test_requests_that_become_held_let_those_in_front_move_up() -> None:
    cluster = Cluster(1000, run_ahead=1)
    cluster.executor_ready("a", capacity(max_rows=1), 0.0)
    for handle in range(50):
        assert cluster.add_request(handle, np.array([1 + handle], np.int32), 4, GREEDY, 0.0) is None
    cluster.take_due()
    queued = cluster.num_queued
    assert queued > 1
    cluster.hold(0, True)
    cluster.take_due()
    assert cluster.num_queued == queued - 1


def test_an_urgent_request_that_is_held_makes_room_all_the_same() -> None:
    scheduler = Scheduler(capacity(max_rows=2), run_ahead=1)
    slow, other = request(0, [1], priority=-5), request(1, [2], priority=5)
    scheduler.add_request(slow)
    scheduler.add_request(other)
    assert step(scheduler) == [0, 1]
    scheduler.set_held(slow, True)
    scheduler.add_request(request(2, [3], priority=0))
    assert sorted(step(scheduler)) == [1, 2]


def test_an_equal_waits_until_a_prompt_that_was_begun_is_done() -> None:
    scheduler = Scheduler(capacity(max_batched_tokens=8), run_ahead=1)
    scheduler.add_request(request(0, list(range(1, 25)), max_tokens=2))
    assert step(scheduler) == []
    scheduler.add_request(request(1, [90, 91, 92], max_tokens=2))
    assert schedule(scheduler).num_tokens.tolist() == [8]


def test_whoever_may_have_a_plan_to_give_is_named() -> None:
    cluster = Cluster(1000, run_ahead=1)
    cluster.executor_ready("a", capacity(max_rows=1), 0.0)
    cluster.executor_ready("b", capacity(max_rows=1), 0.0)
    assert cluster.take_due() == ["a", "b"]
    assert cluster.take_due() == []
    cluster.add_request(0, np.array([1], np.int32), 4, GREEDY, 0.0)
    assert cluster.take_due() == ["a"]
    plan = cluster.schedule("a", 0.0)
    assert plan is not None and cluster.take_due() == []
    outputs = cluster.settle("a", StepResult(1, np.array([5], np.int32)))
    assert outputs.handles.tolist() == [0] and cluster.take_due() == ["a"]
    for held in (True, False):
        cluster.hold(0, held)
        assert cluster.take_due() == ["a"]
    cluster.abort(0)
    assert cluster.take_due() == ["a"]


def test_an_admission_lets_the_next_one_in_the_front_queue_move_up() -> None:
    cluster = Cluster(1000, run_ahead=1)
    cluster.executor_ready("a", capacity(max_rows=1), 0.0)
    for handle in range(50):
        cluster.add_request(handle, np.array([1 + handle], np.int32), 4, GREEDY, 0.0)
    cluster.take_due()
    queued = cluster.num_queued
    assert cluster.schedule("a", 0.0) is not None
    cluster.take_due()
    assert cluster.num_queued == queued - 1
