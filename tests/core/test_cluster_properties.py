"""Random arrivals, aborts, holds, drains, tiny pools, late results, lost executors at every run-ahead."""

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler_service.core.request import SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from tests.core.world import World
from tests.fakes.shadow_executor import GRAMMAR, POISON

VOCAB = 97
BLOCK = 4

SAMPLINGS = st.builds(
    SamplingParams,
    encoded=st.sampled_from([b"", GRAMMAR, POISON]),
    seed=st.integers(0, 3),
    stop_token_ids=st.sets(st.integers(0, VOCAB - 1), max_size=6).map(lambda ids: tuple(sorted(ids))),
    min_tokens=st.integers(0, 8),
    num_logprobs=st.none() | st.integers(0, 3),
    num_prompt_logprobs=st.none(),
    needs_log=st.booleans(),
) | st.builds(SamplingParams, num_prompt_logprobs=st.integers(0, 3), needs_log=st.just(True))


class ClusterMachine(RuleBasedStateMachine):
    """A cluster of shadow executors whose results come back whenever hypothesis wants."""

    @initialize(
        run_ahead=st.sampled_from([None, 1, 2, 3, 8]),
        pools=st.lists(st.integers(6, 24), min_size=1, max_size=3),
        max_rows=st.integers(1, 5),
        budget=st.integers(5, 24),
    )
    def start(self, run_ahead: int | None, pools: list[int], max_rows: int, budget: int) -> None:
        capacities = {
            f"executor-{i}": ExecutorCapacity(BLOCK, pool, max_rows, budget, 64, VOCAB) for i, pool in enumerate(pools)
        }
        self.world = World(run_ahead, capacities, VOCAB)

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 45),
        sampling=SAMPLINGS,
        given=st.sampled_from([0, 0, 0, 3, 9]),
        timeout=st.sampled_from([0.0, 0.0, 0.005]),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([b"", b"s" * 32]),
    )
    def submit(
        self,
        family: int,
        length: int,
        max_tokens: int,
        sampling: SamplingParams,
        given: int,
        timeout: float,
        priority: int,
        salt: bytes,
    ) -> None:
        prompt = [(family * 31 + i * 7) % VOCAB for i in range(length)]
        given = given if sampling.encoded != POISON else 0
        self.world.submit(
            prompt, max_tokens, sampling, given=given, timeout=timeout, priority=priority, cache_salt=salt
        )

    @rule(data=st.data())
    def dispatch(self, data: st.DataObject) -> None:
        self.world.dispatch(self._executor(data))

    @rule(data=st.data(), count=st.integers(1, 8))
    def settle(self, data: st.DataObject, count: int) -> None:
        name = self._executor(data)
        for _ in range(count):
            self.world.settle(name)

    @precondition(lambda self: self.world.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(self.world.live())))

    @precondition(lambda self: self.world.live())
    @rule(data=st.data(), held=st.booleans())
    def hold(self, data: st.DataObject, held: bool) -> None:
        self.world.hold(data.draw(st.sampled_from(self.world.live())), held)

    @rule(data=st.data())
    def lose_executor(self, data: st.DataObject) -> None:
        name = self._executor(data)
        self.world.lose(name)
        self.world.join(name)

    @rule(data=st.data(), order=st.sampled_from(["pause", "drain", "resume"]))
    def order(self, data: st.DataObject, order: str) -> None:
        cluster, name = self.world.cluster, self._executor(data)
        orders = {"pause": cluster.pause_executor, "drain": cluster.drain_executor, "resume": cluster.resume_executor}
        orders[order](name)

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        name = self._executor(data)
        if self.world.let_go(name):
            self.world.join(name)

    def _executor(self, data: st.DataObject) -> str:
        name: str = data.draw(st.sampled_from(sorted(self.world.shadows)))
        return name

    @invariant()
    def bookkeeping_is_sound(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish_all()


EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "150"))
ClusterMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestCluster = ClusterMachine.TestCase
TestCluster = pytest.mark.timeout(1200)(TestCluster)
