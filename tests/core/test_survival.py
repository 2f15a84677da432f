"""What happens to requests when executors die, leave or join."""

import numpy as np

from scheduler_service.core.cluster import ExecutorState
from scheduler_service.core.invariants import check_cluster
from scheduler_service.core.step_plan import StepResult
from tests.core.builders import capacity
from tests.core.clusters import cluster_of, run, submit


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
