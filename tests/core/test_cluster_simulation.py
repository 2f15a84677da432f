"""Long seeded runs of a loaded cluster of shadow executors, aimed at the rare paths; each seed replays exactly."""

import os
import random
from collections import deque

import numpy as np
import pytest

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.invariants import check_integrity
from scheduler_service.core.request import FinishReason, SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import StepResult
from tests.fakes.shadow_executor import ShadowExecutor, oracle

VOCAB = 61
SEEDS = int(os.environ.get("BATON_SIMULATION_SEEDS", "40"))


class Simulation:
    """Callers, a cluster and its executors under one random generator."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.cluster = Cluster(10_000, rng.choice([None, 1, 2, 3, 5, 8]))
        self.capacities = {
            f"executor-{i}": ExecutorCapacity(
                block_size=rng.choice([2, 4, 8]),
                num_blocks=rng.randint(12, 40),
                max_rows=rng.randint(1, 8),
                max_batched_tokens=rng.randint(8, 40),
                max_model_len=64,
                vocab_size=VOCAB,
            )
            for i in range(rng.randint(1, 3))
        }
        self.shadows: dict[str, ShadowExecutor] = {}
        self.in_flight: dict[str, deque[StepResult]] = {}
        for name in self.capacities:
            self.join(name)
        self.expected: dict[int, list[int]] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason] = {}
        self.stats = {"preemptions": 0, "prefix_hit_tokens": 0, "stale_tokens": 0}

    def join(self, name: str) -> None:
        self.cluster.executor_ready(name, self.capacities[name])
        self.shadows[name] = ShadowExecutor(self.capacities[name])
        self.in_flight[name] = deque()

    def submit(self) -> None:
        rng, handle = self.rng, len(self.expected)
        family = rng.randint(0, 2)
        prompt = [(family * 31 + i * 7) % VOCAB for i in range(rng.randint(0, 24))]
        prompt += [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        most = self.cluster.max_total_tokens - len(prompt)
        if most < 1:
            return
        max_tokens = rng.randint(1, min(most, 30))
        stops = tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 4])))
        sampling = SamplingParams(1.0, 0, 1.0, rng.randint(0, 2))
        assert self.cluster.add_request(handle, np.array(prompt, np.int32), max_tokens, sampling, stops, 0.0) is None
        self.expected[handle] = oracle(prompt, max_tokens, sampling.seed, stops, VOCAB)
        self.outputs[handle] = []

    def dispatch(self, name: str) -> bool:
        plan = self.cluster.schedule(name)
        if plan is not None:
            self.in_flight[name].append(self.shadows[name].execute(plan))
        return plan is not None

    def settle(self, name: str) -> bool:
        if not self.in_flight[name]:
            return False
        outputs = self.cluster.settle(name, self.in_flight[name].popleft())
        for handle, token in zip(outputs.handles.tolist(), outputs.token_ids.tolist(), strict=True):
            assert handle not in self.ends
            self.outputs[handle].append(token)
        for end in outputs.finished:
            assert end.handle not in self.ends
            self.ends[end.handle] = end.reason
        return True

    def abort(self) -> None:
        live = [handle for handle in self.expected if handle not in self.ends]
        if live:
            handle = self.rng.choice(live)
            end = self.cluster.abort(handle)
            assert end is not None
            self.ends[handle] = end.reason

    def lose(self, name: str) -> None:
        self.keep_stats(name)
        self.cluster.executor_lost(name, 0.0)
        if self.rng.random() < 0.8 or len(self.shadows) == 1:
            self.join(name)
        else:
            del self.shadows[name], self.in_flight[name]

    def keep_stats(self, name: str) -> None:
        for key in self.stats:
            self.stats[key] += getattr(self.cluster.executors[name].stats, key)

    def step(self) -> None:
        rng, name = self.rng, self.rng.choice(sorted(self.shadows))
        event = rng.random()
        if event < 0.25:
            self.submit()
        elif event < 0.6:
            self.dispatch(name)
        elif event < 0.96:
            for _ in range(rng.randint(1, 3)):
                self.settle(name)
        elif event < 0.985:
            self.abort()
        elif event < 0.99:
            self.lose(name)
        self.check()

    def check(self) -> None:
        for scheduler in self.cluster.executors.values():
            check_integrity(scheduler)

    def run(self, events: int) -> None:
        for _ in range(events):
            self.step()
        for name in self.capacities:
            if name not in self.shadows:
                self.join(name)
        busy = True
        while busy:
            progress = [self.dispatch(name) | self.settle(name) for name in self.shadows]
            busy = any(progress)
            self.check()
        for name in self.shadows:
            self.keep_stats(name)


def run(seed: int) -> Simulation:
    simulation = Simulation(seed)
    simulation.run(events=400)
    return simulation


@pytest.mark.timeout(1200)
def test_streams_equal_the_oracle() -> None:
    total = {"preemptions": 0, "prefix_hit_tokens": 0, "stale_tokens": 0}
    for seed in range(SEEDS):
        simulation = run(seed)
        assert simulation.ends.keys() == simulation.expected.keys(), seed
        for handle, reason in simulation.ends.items():
            expected, output = simulation.expected[handle], simulation.outputs[handle]
            if reason is FinishReason.ABORT:
                assert output == expected[: len(output)], (seed, handle)
            else:
                assert output == expected, (seed, handle)
        cluster = simulation.cluster
        assert cluster.num_requests == cluster.num_queued == 0
        for scheduler in cluster.executors.values():
            assert scheduler.num_running == scheduler.num_waiting == scheduler.kv.pool.num_used == 0
        for key in total:
            total[key] += simulation.stats[key]
    # The runs are worth nothing if they do not get there.
    assert total["preemptions"] > 2 * SEEDS
    assert total["prefix_hit_tokens"] > 100 * SEEDS
    assert total["stale_tokens"] > SEEDS
