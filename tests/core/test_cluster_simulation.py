"""Long seeded runs of a loaded cluster of shadow executors, aimed at the rare paths; each seed replays exactly."""

import os
import random
from collections import Counter
from dataclasses import replace

import pytest

from scheduler_service.core.request import FinishReason, SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from tests.core.world import STATS, World
from tests.fakes.shadow_executor import GRAMMAR, POISON

VOCAB = 61
SEEDS = int(os.environ.get("SIMULATION_SEEDS", "40"))


class Simulation:
    """A world under one random generator. Either executors die by themselves, or poisonous requests kill them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        capacities = {
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
        self.has_poison = rng.random() < 0.4
        self.has_priorities = rng.random() < 0.5
        self.has_slow_readers = rng.random() < 0.5
        self.has_long_answers = rng.random() < 0.3  # few of them: executors have room for what runs on others
        if self.has_long_answers:
            for name, one in capacities.items():
                capacities[name] = replace(one, num_blocks=120, max_rows=8, max_batched_tokens=40)
        self.world = World(rng.choice([None, 1, 2, 3, 5, 8]), capacities, VOCAB)

    def submit(self) -> None:
        rng, world = self.rng, self.world
        family = rng.randint(0, 2)
        prompt = [(family * 31 + i * 7) % VOCAB for i in range(rng.randint(0, 24))]
        prompt += [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        most = world.cluster.max_total_tokens - len(prompt)
        if most < 1:
            return
        max_tokens = rng.randint(1, min(most, 30))
        if self.has_long_answers:
            prompt = prompt[-4:]
            max_tokens = min(world.cluster.max_total_tokens, 64) - len(prompt)
        wants_prompt = rng.random() < 0.1
        sampling = SamplingParams(
            encoded=rng.choice([b"", b"", b"", GRAMMAR]),
            seed=rng.randint(0, 2),
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 4]))),
            min_tokens=rng.choice([0, 0, 5]),
            num_logprobs=rng.choice([None, None, 0, 3]),
            num_prompt_logprobs=rng.randint(0, 2) if wants_prompt else None,
            needs_log=wants_prompt or rng.random() < 0.2,
        )
        if self.has_poison and rng.random() < 0.05:
            sampling = SamplingParams(encoded=POISON, seed=rng.randint(0, 2))
        world.submit(
            prompt,
            max_tokens,
            sampling,
            given=rng.choice([0, 0, 0, rng.randint(1, 20)]) if sampling.encoded != POISON else 0,
            timeout=rng.choice([0.0, 0.0, 0.01, 0.1]),
            priority=rng.randint(-2, 2) if self.has_priorities else 0,
            cache_salt=rng.choice([b"", b"", b"s" * 32]),
        )

    def hold(self) -> None:
        live = self.world.live()
        if not live:
            return
        handle = self.rng.choice(live)
        self.world.hold(handle, not self.world.callers[handle].is_held)

    def change_executor(self, name: str) -> None:
        cluster = self.world.cluster
        self.rng.choice([cluster.pause_executor, cluster.drain_executor, cluster.resume_executor])(name)

    def lose(self, name: str) -> None:
        if self.has_poison:
            return
        self.world.lose(name)
        if self.rng.random() < 0.8 or not self.world.shadows:
            self.world.join(name)

    def step(self) -> None:
        rng, world = self.rng, self.world
        name = rng.choice(sorted(world.shadows))
        event = rng.random()
        if event < 0.25:
            if not self.has_long_answers or len(world.live()) < 8:
                self.submit()
        elif event < 0.6:
            world.dispatch(name)
        elif event < 0.92:
            for _ in range(rng.randint(1, 3)):
                world.settle(name)
        elif event < 0.95:
            self.hold() if self.has_slow_readers else None
        elif event < 0.97:
            if world.live():
                world.abort(rng.choice(world.live()))
        elif event < 0.975:
            self.lose(name)
        elif event < 0.985:
            self.change_executor(name)
        elif len(world.shadows) > 1:
            world.let_go(name)
        world.check()


def run(seed: int, events: int = 400) -> World:
    simulation = Simulation(seed)
    for _ in range(events):
        simulation.step()
    simulation.world.finish_all()
    return simulation.world


@pytest.mark.timeout(1200)
def test_streams_equal_the_oracle() -> None:
    total = dict.fromkeys(STATS, 0)
    ends: Counter[FinishReason] = Counter()
    for seed in range(SEEDS):
        try:
            world = run(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        for key in total:
            total[key] += world.stats[key]
        ends.update(caller.end.reason for caller in world.callers.values() if caller.end)
    # The runs are worth nothing if they do not get there.
    assert total["preemptions"] > 2 * SEEDS
    assert total["handovers"] > SEEDS // 4
    assert total["prefix_hit_tokens"] > 100 * SEEDS
    assert total["stale_tokens"] > SEEDS
    assert total["audited_tokens"] > 10 * SEEDS
    assert ends.keys() == set(FinishReason) - {FinishReason.REJECTED, FinishReason.OVERLOADED}, ends
