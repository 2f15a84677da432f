"""Random arrivals, aborts, tiny pools, late results, lost executors at every run-ahead: outputs are the oracle's."""

import os
from collections import deque

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.invariants import check_integrity
from scheduler_service.core.request import FinishReason, SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import StepResult
from tests.fakes.shadow_executor import ShadowExecutor, oracle

VOCAB = 97
BLOCK = 4


class ClusterMachine(RuleBasedStateMachine):
    """A cluster of shadow executors whose results come back whenever hypothesis wants."""

    @initialize(
        run_ahead=st.sampled_from([None, 1, 2, 3, 8]),
        pools=st.lists(st.integers(6, 24), min_size=1, max_size=3),
        max_rows=st.integers(1, 5),
        budget=st.integers(5, 24),
    )
    def start(self, run_ahead: int | None, pools: list[int], max_rows: int, budget: int) -> None:
        self.cluster = Cluster(max_queued_requests=1000, run_ahead=run_ahead)
        self.shadows: dict[str, ShadowExecutor] = {}
        self.in_flight: dict[str, deque[StepResult]] = {}
        self.capacities = {
            f"executor-{i}": ExecutorCapacity(BLOCK, pool, max_rows, budget, 64, VOCAB) for i, pool in enumerate(pools)
        }
        for name in self.capacities:
            self._join(name)
        self.expected: dict[int, list[int]] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason] = {}
        self.next_handle = 0

    def _join(self, name: str) -> None:
        self.cluster.executor_ready(name, self.capacities[name])
        self.shadows[name] = ShadowExecutor(self.capacities[name])
        self.in_flight[name] = deque()

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        seed=st.integers(0, 3),
        stops=st.sets(st.integers(0, VOCAB - 1), max_size=6),
    )
    def submit(self, family: int, length: int, max_tokens: int, seed: int, stops: set[int]) -> None:
        prompt = [(family * 31 + i * 7) % VOCAB for i in range(length)]
        handle = self.next_handle
        self.next_handle += 1
        stop_ids = tuple(sorted(stops))
        rejected = self.cluster.add_request(
            handle, np.array(prompt, np.int32), max_tokens, SamplingParams(1.0, 0, 1.0, seed), stop_ids, now=0.0
        )
        fits = length + max_tokens <= max(c.max_total_tokens for c in self.capacities.values())
        assert (rejected is None) == fits
        if rejected is None:
            self.expected[handle] = oracle(prompt, max_tokens, seed, stop_ids, VOCAB)
            self.outputs[handle] = []

    @rule(data=st.data())
    def dispatch(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.shadows)))
        self._dispatch(name)

    def _dispatch(self, name: str) -> bool:
        plan = self.cluster.schedule(name)
        if plan is None:
            return False
        self.in_flight[name].append(self.shadows[name].execute(plan))
        return True

    @rule(data=st.data(), count=st.integers(1, 8))
    def settle(self, data: st.DataObject, count: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.shadows)))
        for _ in range(min(count, len(self.in_flight[name]))):
            self._settle(name)

    def _settle(self, name: str) -> None:
        outputs = self.cluster.settle(name, self.in_flight[name].popleft())
        for handle, token in zip(outputs.handles.tolist(), outputs.token_ids.tolist(), strict=True):
            assert handle not in self.ends
            self.outputs[handle].append(token)
            assert self.outputs[handle] == self.expected[handle][: len(self.outputs[handle])]
        for end in outputs.finished:
            assert end.handle not in self.ends
            self.ends[end.handle] = end.reason

    @precondition(lambda self: len(self.expected) > len(self.ends))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(set(self.expected) - set(self.ends))))
        end = self.cluster.abort(handle)
        assert end is not None and end.reason is FinishReason.ABORT
        self.ends[handle] = end.reason

    @rule(data=st.data())
    def lose_executor(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.shadows)))
        self.cluster.executor_lost(name, now=0.0)
        self._join(name)

    @invariant()
    def bookkeeping_is_sound(self) -> None:
        for scheduler in self.cluster.executors.values():
            check_integrity(scheduler)

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        busy = True
        while busy:
            busy = False
            for name in self.shadows:
                busy |= self._dispatch(name) or bool(self.in_flight[name])
                if self.in_flight[name]:
                    self._settle(name)
            self.bookkeeping_is_sound()
        assert set(self.ends) == set(self.expected)
        assert self.cluster.num_requests == self.cluster.num_queued == 0
        for handle, reason in self.ends.items():
            if reason is not FinishReason.ABORT:
                assert self.outputs[handle] == self.expected[handle]
        for scheduler in self.cluster.executors.values():
            assert scheduler.num_running == scheduler.num_waiting == scheduler.kv.pool.num_used == 0


EXAMPLES = int(os.environ.get("BATON_PROPERTY_EXAMPLES", "150"))
ClusterMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestCluster = ClusterMachine.TestCase
TestCluster = pytest.mark.timeout(1200)(TestCluster)
