"""Runs of the simulator: one per seed, each of which can be told again."""

import asyncio
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.simulation.clock import VirtualLoop, virtual_world
from tests.simulation.network import VirtualZmq
from tests.simulation.world import Entry, World

EVENTS_PER_SEED = 4000


@dataclass
class Report:
    """What a run, or many of them, came to."""

    num_events: int = 0
    seconds: float = 0.0
    virtual_seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    seeds: list[int] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Both together."""
        self.num_events += other.num_events
        self.seconds += other.seconds
        self.virtual_seconds += other.virtual_seconds
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.reached += other.reached
        self.seeds += other.seeds


class SimulationError(AssertionError):
    """A run went wrong; how to see it again."""

    def __init__(self, seed: int, num_events: int, problem: BaseException, story: list[Entry]) -> None:
        super().__init__(
            f"{type(problem).__name__}: {problem} {' '.join(getattr(problem, '__notes__', ()))}; "
            f"again: python -m tests.simulation --seed {seed} --events-per-run {num_events}"
        )
        self.seed = seed
        self.story = story


def simulate(seed: int, num_events: int = EVENTS_PER_SEED, *, tells: bool = False) -> tuple[Report, list[Entry]]:
    """Trouble for about ``num_events`` events, then calm; the story if it is to be told.

    Raises:
        SimulationError: something that must hold does not.
    """
    began = time.perf_counter()
    loop = VirtualLoop()
    start = loop.time()
    rng = random.Random(seed ^ 0x5EED)
    zmq = VirtualZmq(loop, random.Random(seed ^ 0xCAFE))
    logging.disable(logging.CRITICAL)
    world = None
    try:
        with virtual_world(loop, rng, zmq):
            asyncio.set_event_loop(loop)
            world = World(seed, loop, zmq, tells=tells)
            try:
                loop.run_until_complete(world.run(lambda: loop.num_events >= num_events))
            finally:
                _leave_nothing(loop)
    except Exception as error:
        raise SimulationError(seed, num_events, error, world.story if world else []) from error
    finally:
        logging.disable(logging.NOTSET)
        asyncio.set_event_loop(None)
        loop.close()
    report = Report(
        loop.num_events,
        time.perf_counter() - began,
        loop.time() - start,
        world.outcomes,
        world.fault_counts,
        world.reached,
        [seed],
    )
    return report, world.story


def _leave_nothing(loop: VirtualLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
