"""What goes wrong. Each fault ends by itself, unless it says otherwise."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from scheduler_service.engine.api_wire import ExecutorAction

if TYPE_CHECKING:
    from tests.simulation.executor_node import ExecutorNode, Wire
    from tests.simulation.world import World

Fault = Callable[["World", random.Random], None]


def kill_executor(world: "World", rng: random.Random) -> None:
    """SIGKILL, or a machine that is gone without a word; a new process comes later, now and then a smaller one."""
    node = _some_executor(world, rng)
    if node is None:
        return
    silently = rng.random() < 0.4
    world.note(node.name, "is killed" + (" without a word" if silently else ""))
    node.kill(silently=silently)
    if rng.random() < 0.3:
        spec = world.specs[node.name]
        blocks = max(world.least_blocks, spec.num_blocks - rng.randint(1, 8))
        world.specs[node.name] = replace(spec, num_blocks=blocks)
    world.start_executor_later(node.name, rng.uniform(0.1, 4.0))


def freeze_executor(world: "World", rng: random.Random) -> None:
    """SIGSTOP, then SIGCONT: longer than the lease, it is a zombie."""
    node = _some_executor(world, rng)
    if node is None:
        return
    seconds = rng.choice([rng.uniform(0.05, 1.0), rng.uniform(2.0, 5.0)])
    world.note(node.name, f"freezes for {seconds:.2f} s")
    node.freeze()
    world.loop.call_later(seconds, node.thaw)


def slow_executor(world: "World", rng: random.Random) -> None:
    """Its steps take longer from now on."""
    node = _some_executor(world, rng)
    if node is not None:
        node.step_seconds = rng.choice([0.001, 0.01, 0.1])
        world.note(node.name, f"takes {node.step_seconds:g} s for a step")


def hang_executor(world: "World", rng: random.Random) -> None:
    """A step does not end for long, and heartbeats go on."""
    node = _some_executor(world, rng)
    if node is not None:
        seconds = rng.choice([rng.uniform(0.5, 2.5), rng.uniform(5.0, 40.0)])
        world.note(node.name, f"hangs for {seconds:.1f} s")
        node.stuck_until = world.loop.time() + seconds


def fail_step(world: "World", rng: random.Random) -> None:
    """The device fails in the next step."""
    node = _some_executor(world, rng)
    if node is not None:
        node.fails_next = True


def break_wire(world: "World", rng: random.Random) -> None:
    """A connection breaks; frames under way are lost, or come late and out of order."""
    wire = _some_wire(world, rng)
    if wire is not None:
        wire.cut(rng.choice([0.0, 0.5, 1.0]), silently=rng.random() < 0.3)


def partition(world: "World", rng: random.Random) -> None:
    """Nothing arrives for a while, in one direction or in both."""
    wire = _some_wire(world, rng)
    if wire is None:
        return
    up = rng.random() < 0.7
    seconds = rng.choice([rng.uniform(0.01, 1.0), rng.uniform(2.0, 5.0)])
    world.note("network", f"nothing arrives for {seconds:.2f} s {'from' if up else 'at'} an executor")
    wire.hold(up=up, down=not up or rng.random() < 0.5)
    world.loop.call_later(seconds, wire.heal)


def drain_executor(world: "World", rng: random.Random) -> None:
    """SIGTERM; another process takes its place later."""
    node = _some_executor(world, rng)
    if node is not None:
        world.note(node.name, "is told to leave")
        node.drain()


def order_executor(world: "World", rng: random.Random) -> None:
    """An operator pauses, drains or resumes an executor."""
    pod = world.some_pod(rng)
    if pod is None or not pod.engine._cluster.executors:
        return
    executor_id = rng.choice(list(pod.engine._cluster.executors))
    action = rng.choice(list(ExecutorAction))
    world.note(pod.name, f"operator's order: {action.name.lower()} {executor_id}")
    pod.command(executor_id, action)
    if action is ExecutorAction.PAUSE:
        world.loop.call_later(rng.uniform(0.1, 3.0), _resume, pod, executor_id)


def kill_scheduler(world: "World", rng: random.Random) -> None:
    """A scheduler's pod is gone with all that it knew; a new one comes later."""
    pod = world.some_pod(rng)
    if pod is None:
        return
    world.note(pod.name, "is killed")
    world.kill_pod(pod)
    world.loop.call_later(rng.uniform(0.2, 3.0), world.start_pod, pod.slot)


def freeze_scheduler(world: "World", rng: random.Random) -> None:
    """An engine stands still for a while, now and then longer than its leases."""
    pod = world.some_pod(rng)
    if pod is not None:
        seconds = rng.choice([rng.uniform(0.01, 1.0), rng.uniform(1.0, 2.8)])
        world.note(pod.name, f"stands still for {seconds:.2f} s")
        pod.freeze(seconds)


def kill_api(world: "World", rng: random.Random) -> None:
    """An api process dies and is started again."""
    pod = world.some_pod(rng)
    if pod is not None:
        index = rng.randrange(len(pod.apis))
        world.note(pod.apis[index].name, "is killed")
        pod.restart_api(index)


def break_call(world: "World", rng: random.Random) -> None:
    """A caller's connection breaks."""
    calls = world.live_calls()
    if calls:
        rng.choice(calls).break_off()


def hold_call(world: "World", rng: random.Random) -> None:
    """Nothing arrives at a caller for a while, nor from it."""
    calls = world.live_calls()
    if calls:
        call = rng.choice(calls)
        call.hold()
        world.loop.call_later(rng.uniform(0.01, 3.0), call.heal)


def bad_network(world: "World", rng: random.Random) -> None:
    """Frames are lost, repeated, corrupted and late for a while."""
    quality = world.executor_links
    quality.loss = rng.choice([0.0, 0.02, 0.2])
    quality.repetition = rng.choice([0.0, 0.02, 0.2])
    quality.corruption = rng.choice([0.0, 0.0, 0.02])
    quality.most_delay = rng.choice([0.0005, 0.005, 0.05])
    world.loop.call_later(rng.uniform(0.1, 3.0), world.calm_network)


def scale_to_zero(world: "World", rng: random.Random) -> None:
    """All executors go, and come again later."""
    world.note("world", "scales to zero")
    for node in list(world.executors.values()):
        node.kill() if rng.random() < 0.5 else node.drain()
        world.start_executor_later(node.name, rng.uniform(0.5, 5.0))


# Those that do not end any executor's session while it has work, at least not often enough to make anybody suspect.
GENTLE: tuple[Fault, ...] = (slow_executor, order_executor, kill_api, break_call, hold_call)
ROUGH: tuple[Fault, ...] = (
    kill_executor,
    freeze_executor,
    hang_executor,
    fail_step,
    break_wire,
    partition,
    drain_executor,
    kill_scheduler,
    freeze_scheduler,
    bad_network,
    scale_to_zero,
)


def _some_executor(world: "World", rng: random.Random) -> "ExecutorNode | None":
    nodes = [node for node in world.executors.values() if node.is_alive]
    return rng.choice(nodes) if nodes else None


def _some_wire(world: "World", rng: random.Random) -> "Wire | None":
    node = _some_executor(world, rng)
    return None if node is None else rng.choice(list(node.wires.values()))


def _resume(pod: object, executor_id: str) -> None:
    from tests.simulation.scheduler_node import SchedulerPod

    assert isinstance(pod, SchedulerPod)
    if pod.is_alive:
        pod.command(executor_id, ExecutorAction.RESUME)
