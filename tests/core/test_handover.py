"""Running requests move from a busy executor to an idler one, where that pays, and do not come back."""

from collections import Counter

import numpy as np
import pytest

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.handover import STAY_TOKENS
from scheduler_service.core.invariants import check_cluster
from scheduler_service.core.request import SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import SAMPLE, StepPlan, StepResult
from tests.core.builders import GREEDY
from tests.core.world import World

LONG = 1000
ROWS = 16


def executor(num_blocks: int = 300, max_rows: int = ROWS, arithmetic: str | None = "") -> ExecutorCapacity:
    return ExecutorCapacity(16, num_blocks, max_rows, 128, 2000, 1000, arithmetic)


class Loaded:
    """A cluster whose executor ``a`` runs ``num_requests`` requests; its steps sample 7 all the time."""

    def __init__(self, num_requests: int, run_ahead: int = 2, capacity: ExecutorCapacity | None = None) -> None:
        self.cluster = Cluster(1000, run_ahead)
        self.in_flight: dict[str, list[StepPlan]] = {}
        self.tokens: Counter[int] = Counter()
        self.moves: list[tuple[int, str]] = []
        self.join("a", capacity)
        for handle in range(num_requests):
            self.submit(handle)

    def join(self, name: str, capacity: ExecutorCapacity | None = None) -> None:
        self.cluster.executor_ready(name, capacity or executor(), 0.0)
        self.in_flight[name] = []

    def submit(
        self,
        handle: int,
        max_tokens: int = LONG,
        prompt: tuple[int, ...] = (1, 2, 3),
        sampling: SamplingParams = GREEDY,
    ) -> None:
        tokens = np.array([*prompt, handle], np.int32)
        assert self.cluster.add_request(handle, tokens, max_tokens, sampling, 0.0) is None

    def turn(self, count: int = 1) -> None:
        """Every executor's next plans, and the result of its oldest."""
        for _ in range(count):
            for name, plans in self.in_flight.items():
                before = {handle for handle, home in self.cluster._homes.items() if home == name}
                while (plan := self.cluster.schedule(name, 0.0)) is not None:
                    plans.append(plan)
                after = {handle for handle, home in self.cluster._homes.items() if home == name}
                self.moves += [(handle, name) for handle in before - after]
                if plans:
                    plan = plans.pop(0)
                    samples = int(np.count_nonzero(plan.flags & SAMPLE))
                    outputs = self.cluster.settle(name, StepResult(plan.step_id, np.full(samples, 7, np.int32)))
                    self.tokens.update(outputs.handles.tolist())
        check_cluster(self.cluster)

    def rows(self) -> dict[str, int]:
        return {name: one.num_running for name, one in self.cluster.executors.items()}

    def handovers(self) -> int:
        return sum(one.stats.handovers for one in self.cluster.executors.values())


@pytest.mark.parametrize("run_ahead", [1, 2, 8])
def test_an_executor_that_joins_takes_its_share_of_what_runs(run_ahead: int) -> None:
    loaded = Loaded(ROWS, run_ahead)
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    loaded.turn(80)
    assert loaded.rows()["b"] in (7, 8)  # one row is no reason to move
    assert loaded.handovers() == loaded.rows()["b"]
    assert min(loaded.tokens.values()) > STAY_TOKENS + 60  # nobody waits for long


def test_all_executors_share_the_load_of_one() -> None:
    loaded = Loaded(ROWS)
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    loaded.join("c")
    loaded.turn(200)
    rows = loaded.rows()
    assert sum(rows.values()) == ROWS
    assert max(rows.values()) - min(rows.values()) <= 3


def test_nobody_goes_to_and_fro() -> None:
    loaded = Loaded(ROWS)
    for round_ in range(6):
        loaded.turn(STAY_TOKENS)
        if round_ % 2:
            del loaded.in_flight["b"]
            loaded.cluster.executor_lost("b", 0.0)
        else:
            loaded.join("b")
        loaded.turn(60)
    times = Counter(handle for handle, _ in loaded.moves)
    assert loaded.moves and max(times.values()) <= 3  # as often as b has joined
    assert {name for _, name in loaded.moves} == {"a"}


def test_nothing_moves_between_executors_that_are_alike() -> None:
    loaded = Loaded(0)
    loaded.join("b")
    for handle in range(2 * ROWS):
        loaded.submit(handle, max_tokens=LONG if handle % 8 else 40)
    loaded.turn(200)
    assert loaded.handovers() == 0


def test_a_draw_of_one_row_is_no_reason_to_move() -> None:
    loaded = Loaded(3)
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    loaded.turn(100)
    assert loaded.handovers() == 0


def test_who_has_just_come_stays() -> None:
    loaded = Loaded(ROWS)
    loaded.turn(STAY_TOKENS - 10)
    loaded.join("b")
    loaded.turn(9)
    assert max(loaded.tokens.values()) == STAY_TOKENS - 1
    assert loaded.handovers() == 0


def test_who_is_about_to_end_stays() -> None:
    loaded = Loaded(0)
    for handle in range(8):
        loaded.submit(handle, max_tokens=2 * STAY_TOKENS - 1)
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    loaded.turn(2 * STAY_TOKENS)
    assert loaded.handovers() == 0 and not loaded.cluster.num_requests


def test_what_costs_more_than_it_gains_stays() -> None:
    loaded = Loaded(0)
    for handle in range(8):
        loaded.submit(handle, max_tokens=40, prompt=tuple(range(200)))
    loaded.turn(STAY_TOKENS + 5)
    assert all(STAY_TOKENS <= loaded.tokens[handle] <= 40 - STAY_TOKENS for handle in range(8))
    loaded.join("b")
    loaded.turn(30)
    assert loaded.handovers() == 0


def test_the_cheapest_move_first() -> None:
    loaded = Loaded(0, run_ahead=1)
    prompts = {handle: tuple(range(handle * 100, handle * 100 + 10 + 20 * (handle % 2))) for handle in range(8)}
    for handle, prompt in prompts.items():
        loaded.submit(handle, prompt=prompt)
    loaded.turn(STAY_TOKENS + 8)
    loaded.join("b")
    loaded.turn(30)
    assert {handle for handle, _ in loaded.moves} == {2, 4, 6}


def test_a_cached_prefix_costs_nothing() -> None:
    loaded = Loaded(0, run_ahead=1)
    loaded.join("b")
    shared = tuple(range(500, 620))
    loaded.cluster.pause_executor("a")
    loaded.submit(100, max_tokens=1, prompt=shared)
    loaded.turn(4)
    loaded.cluster.resume_executor("a")
    loaded.cluster.pause_executor("b")
    for handle in range(8):
        loaded.submit(handle, prompt=shared if handle in (3, 5) else tuple(range(handle * 50, handle * 50 + 60)))
    loaded.turn(STAY_TOKENS + 30)
    loaded.cluster.resume_executor("b")
    loaded.turn(30)
    assert {3, 5} <= {handle for handle, name in loaded.moves if name == "a"}


def test_callers_of_the_others_keep_their_pace() -> None:
    """At most four move at a time, and those get their next token within a few steps."""
    loaded = Loaded(ROWS, run_ahead=2)
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    last_news = dict.fromkeys(range(ROWS), 0)
    for turn in range(60):
        before = Counter(loaded.tokens)
        loaded.turn()
        for handle in loaded.tokens - before:
            last_news[handle] = turn
        silent = [handle for handle, at in last_news.items() if at < turn]
        assert len(silent) <= 4
        assert all(turn - last_news[handle] <= 6 for handle in silent)


@pytest.mark.parametrize("order", ["pause", "drain"])
def test_nothing_moves_to_an_executor_that_takes_nothing(order: str) -> None:
    loaded = Loaded(ROWS)
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    getattr(loaded.cluster, f"{order}_executor")("b")
    loaded.turn(60)
    assert loaded.rows() == {"a": ROWS, "b": 0}
    assert loaded.handovers() == 0
    loaded.cluster.resume_executor("b")
    loaded.turn(60)
    assert loaded.rows()["b"] >= 5


@pytest.mark.parametrize(
    "other", [executor(num_blocks=40), executor(arithmetic="other"), executor(arithmetic=None)], ids=repr
)
def test_nothing_moves_where_it_does_not_fit_or_would_not_be_exact(other: ExecutorCapacity) -> None:
    loaded = Loaded(ROWS)
    loaded.turn(STAY_TOKENS)
    loaded.join("b", other)
    loaded.turn(60)
    assert loaded.handovers() == 0


def test_a_small_pool_takes_what_it_can_hold() -> None:
    """Four rows of 36 tokens, with as much again to come: nobody is preempted there before it might move on."""
    loaded = Loaded(0, run_ahead=1, capacity=ExecutorCapacity(4, 2000, ROWS, 64, 120, 1000))
    for handle in range(ROWS):
        loaded.submit(handle, max_tokens=100)
    loaded.turn(STAY_TOKENS + 16)
    loaded.join("b", ExecutorCapacity(4, 40, ROWS, 512, 120, 1000))
    loaded.turn(STAY_TOKENS)
    assert 1 <= loaded.rows()["b"] <= 3
    other = loaded.cluster.executors["b"]
    assert other.stats.preemptions == other.num_waiting == 0


def test_who_is_held_or_aborted_on_the_way_goes_nowhere() -> None:
    loaded = Loaded(8, run_ahead=4)
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    while not loaded.cluster._moves:
        loaded.turn()
    held, aborted, *_ = loaded.cluster._moves
    loaded.cluster.hold(held, True)
    assert loaded.cluster.abort(aborted) is not None
    loaded.turn(20)
    assert loaded.cluster._homes[held] == "a" and aborted not in loaded.cluster._homes
    loaded.cluster.hold(held, False)
    loaded.turn(20)
    assert loaded.cluster._homes[held] == "a"
    assert not loaded.cluster._moves


def test_who_ends_on_the_way_is_forgotten() -> None:
    loaded = Loaded(0, run_ahead=4)
    for handle in range(8):
        loaded.submit(handle, sampling=SamplingParams(stop_token_ids=(9,)))
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    while not loaded.cluster.moving():
        loaded.turn()
    for plan in loaded.in_flight.pop("a"):
        tokens = np.full(np.count_nonzero(plan.flags & SAMPLE), 9, np.int32)
        loaded.cluster.settle("a", StepResult(plan.step_id, tokens))
    assert not loaded.cluster.num_requests
    check_cluster(loaded.cluster)


def test_a_target_that_dies_is_not_waited_for() -> None:
    loaded = Loaded(8, run_ahead=4)
    loaded.turn(STAY_TOKENS)
    loaded.join("b")
    while not loaded.cluster._moves:
        loaded.turn()
    loaded.cluster.executor_lost("b", 0.0)
    del loaded.in_flight["b"]
    loaded.turn(20)
    assert loaded.rows() == {"a": 8}


def test_streams_that_move_are_those_that_do_not() -> None:
    world = World(4, {"a": ExecutorCapacity(4, 200, 8, 32, 128, 97)}, 97)
    for seed in range(8):
        world.submit([seed, 2, 3], 110, SamplingParams(seed=seed, num_logprobs=seed % 3, needs_log=seed % 2 > 0))
    for _ in range(40):
        world.dispatch("a")
        world.settle("a")
    world.capacities["b"] = world.capacities["a"]
    world.join("b")
    world.finish_all()  # compares all of them with the oracle
    assert world.stats["handovers"] == 3
    assert world.stats["audited_tokens"] > 60
