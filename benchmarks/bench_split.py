"""What it costs that scheduler and executor are two processes, and how much distance they bear.

The same requests, taking turns in one run, go to
  in-process    scheduling core and executor in one thread, no sockets
  loopback      engine process and executor process over ZeroMQ
  N ms          the same, through a proxy that adds N ms of round trip
gRPC is left out everywhere: this benchmark plays the api process. With --step-ms the executor is a shadow whose steps
all take that time, so that nothing but scheduling and distance can make a difference.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.checkpoints import DTYPE, add_model_options, cached_checkpoint
from benchmarks.engine_rig import EngineCaller, EngineProcess
from benchmarks.environment import environment
from benchmarks.figures import emit, median, note, run_main
from benchmarks.machine import ForeignLoad, usable_cores
from benchmarks.processes import Child, ProcessFailedError, python_module
from benchmarks.sides import driver_request
from benchmarks.workloads import WARM_UP, Request, mixed
from executor_service.process import TORCH_DEFAULTS

IN_PROCESS = "in-process"
LOOPBACK = "loopback"

_KV_MEMORY = "2GiB"
_START_SECONDS = 120.0
_RUN_SECONDS = 300.0
_SHADOW_ROWS = 64


@dataclass(frozen=True, slots=True)
class Run:
    """One run: seconds, and what the executor said of its steps. Zeros where there is nobody to say it."""

    wall: float
    starved_us: int = 0
    device_us: int = 0
    steps: int = 0
    run_ahead: int = 0


class Side(Protocol):
    """One way of joining scheduler and executor."""

    def run(self, requests: Sequence[Request]) -> Run:
        """Run requests together."""


class InProcessSide:
    """Everything in one child process."""

    def __init__(self, stack: ExitStack, checkpoint: Path, threads: int) -> None:
        command = python_module(
            "benchmarks.in_process", "--model", checkpoint, "--threads", threads, "--kv-memory", _KV_MEMORY
        )
        self._child = stack.enter_context(Child(IN_PROCESS, command, TORCH_DEFAULTS, stdin=True))
        _raise_error(self._child.json(_START_SECONDS))

    def run(self, requests: Sequence[Request]) -> Run:
        self._child.say(driver_request(requests))
        answer = self._child.json(_RUN_SECONDS)
        _raise_error(answer)
        if answer["lengths"] != [request.max_tokens for request in requests]:
            raise ProcessFailedError("some outputs have other lengths than asked for")
        return Run(answer["wall_s"])


class SplitSide:
    """An engine process, an executor process, and the way between them."""

    def __init__(self, stack: ExitStack, executor: Sequence[object], round_trip_ms: float | None) -> None:
        """Start them.

        Args:
            stack: what ends them.
            executor: module and arguments of the executor, with the endpoint to dial missing after the first.
            round_trip_ms: of the proxy between them; None = no proxy.
        """
        engine = stack.enter_context(EngineProcess())
        endpoint = engine.endpoint
        if round_trip_ms is not None:
            command = python_module("benchmarks.delay_proxy", endpoint, "--round-trip-ms", round_trip_ms)
            endpoint = stack.enter_context(Child("proxy", command)).line(_START_SECONDS)
        module, flag, *arguments = executor
        command = python_module(str(module), *([flag] if flag else []), endpoint, *arguments)
        stack.enter_context(Child("executor", command))
        self._caller = EngineCaller(engine.api_endpoint)
        stack.callback(self._caller.close)
        self._caller.wait_ready(_START_SECONDS)

    def run(self, requests: Sequence[Request]) -> Run:
        before = self._caller.executor(_RUN_SECONDS)
        began = time.perf_counter()
        self._caller.run(requests, _RUN_SECONDS)
        wall = time.perf_counter() - began
        after = self._caller.executor(_RUN_SECONDS)
        return Run(
            wall,
            after.starved_us - before.starved_us,
            after.device_us - before.device_us,
            after.steps - before.steps,
            after.run_ahead,
        )


def start_real(stack: ExitStack, checkpoint: Path, threads: int, round_trips: Sequence[float]) -> dict[str, Side]:
    """All sides with a model."""
    executor = ["executor_service", "--scheduler", "--model", checkpoint, "--threads", threads, "--dtype", DTYPE]
    executor += ["--kv-memory", _KV_MEMORY, "--log-level", "error", "--die-with-parent"]
    return {IN_PROCESS: InProcessSide(stack, checkpoint, threads), **_split_sides(stack, executor, round_trips)}


def start_shadows(stack: ExitStack, step_ms: float, round_trips: Sequence[float]) -> dict[str, Side]:
    """All sides that a shadow can stand in for."""
    executor = ["benchmarks.shadow_executors", "", "--step-ms", step_ms, "--rows", _SHADOW_ROWS]
    return _split_sides(stack, executor, round_trips)


def _split_sides(stack: ExitStack, executor: Sequence[object], round_trips: Sequence[float]) -> dict[str, Side]:
    sides: dict[str, Side] = {}
    for round_trip in (None, *round_trips):
        name = LOOPBACK if round_trip is None else f"{round_trip:g} ms"
        note(f"starting {name}")
        sides[name] = SplitSide(stack, executor, round_trip)
    return sides


def compare(sides: Mapping[str, Side], requests: int, runs: int) -> list[dict[str, object]]:
    """A figure per side: throughput against the first one and against the proxy without delay, and absolute."""
    load = ForeignLoad()
    for index, side in enumerate(sides.values()):
        side.run(WARM_UP.make(index))
        side.run(mixed(500 + index, requests))  # and the depth of run-ahead has settled
    done: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(runs):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            done[name].append(sides[name].run(mixed(number, requests)))
    tokens = sum(request.max_tokens for request in mixed(0, requests))
    first = next(iter(sides))
    return [
        {
            "side": name,
            f"speed_over_{first}": _ratio(done[first], own),
            "speed_over_0_ms": _ratio(done["0 ms"], own) if "0 ms" in done else None,
            **_summary(own, tokens),
            "foreign_cores": load.cores(),
        }
        for name, own in done.items()
    ]


def _ratio(reference: Sequence[Run], own: Sequence[Run]) -> float:
    return median(one.wall / other.wall for one, other in zip(reference, own, strict=True))


def _summary(runs: Sequence[Run], tokens: int) -> dict[str, object]:
    wall = statistics.median(run.wall for run in runs)
    device_us = sum(run.device_us for run in runs)
    return {
        "runs": len(runs),
        "out_tok_s": round(tokens / wall, 1),
        "wall_s": round(wall, 4),
        "spread": round((max(run.wall for run in runs) - min(run.wall for run in runs)) / wall, 3),
        "starved_share": round(sum(run.starved_us for run in runs) / device_us, 4) if device_us else None,
        "device_share": round(device_us / 1e6 / sum(run.wall for run in runs), 4) if device_us else None,
        "run_ahead": runs[-1].run_ahead or None,
        "steps": statistics.median(run.steps for run in runs) or None,
    }


def _raise_error(answer: Mapping[str, object]) -> None:
    if "error" in answer:
        raise ProcessFailedError(f"{IN_PROCESS}: {answer['error']}")


def main() -> None:
    """Print one JSON line per way of joining the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, ("qwen3-small",))
    parser.add_argument("--requests", type=int, default=64, help="with a model; 64 is W1")
    parser.add_argument("--round-trips", type=float, nargs="*", default=[0.0, 1.0, 10.0], metavar="MS")
    parser.add_argument("--step-ms", type=float, nargs="*", default=[5.0], help="of shadow executors; none: no shadows")
    parser.add_argument(
        "--shadow-requests",
        type=int,
        default=256,
        help="with shadows; 256 are four waves, so that the ends weigh little",
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads (default: all cores)")
    args = parser.parse_args()
    emit(**environment("torch", "pyzmq", "numpy"), dtype=DTYPE, threads=args.threads)
    for step_ms in args.step_ms:
        with ExitStack() as stack:
            for figure in compare(start_shadows(stack, step_ms, args.round_trips), args.shadow_requests, args.runs):
                emit(bench="split", executor=f"shadow {step_ms:g} ms", requests=args.shadow_requests, **figure)
    for shape in args.shapes:
        checkpoint = cached_checkpoint(shape, args.models)
        with ExitStack() as stack:
            sides = start_real(stack, checkpoint, args.threads, args.round_trips)
            for figure in compare(sides, args.requests, args.runs):
                emit(bench="split", executor=shape, requests=args.requests, **figure)


if __name__ == "__main__":
    run_main(main)
