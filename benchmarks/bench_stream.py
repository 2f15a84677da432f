"""Delivery: many gRPC streams from a real scheduler, whose executor is a shadow with steps of a fixed time.

Every stream gets one token per step. Told are tokens and messages that reach the client, what they cost the api
processes and the engine, and how far the slowest stream is behind.
"""

import argparse
import re
import time
from contextlib import ExitStack
from typing import Final

from baton import Client, ExecutorStatus
from baton.checkpoints import TINY_PYTHON
from benchmarks.environment import cpu_seconds, environment
from benchmarks.figures import emit, median, note, run_main
from benchmarks.machine import ForeignLoad, children, command_line
from benchmarks.processes import Child, python_module

_LISTENING = re.compile(r"listening: grpc (\S+) executors (\S+)")
_START_SECONDS = 60.0
_MAX_MODEL_LEN = 16_384  # no stream shall end before the measurement does
_MAX_TOKENS = 16_000
_API_MODULE: Final = "scheduler_service.api"
_ENGINE_MODULE: Final = "scheduler_service.engine"


class Scheduler:
    """A scheduler with a shadow executor, ready to serve."""

    def __init__(self, stack: ExitStack, api_processes: int, step_ms: float, rows: int) -> None:
        flags = ["--model", TINY_PYTHON, "--port", 0, "--executor-endpoint", "tcp://127.0.0.1:0"]
        flags += ["--api-processes", api_processes, "--log-level", "error", "--lease", 10, "--shutdown-grace", 0]
        command = python_module("scheduler_service", *flags)
        child = Child("scheduler", command, {"BATON_DIE_WITH_PARENT": "1"})
        stack.enter_context(child)
        listening = _LISTENING.fullmatch(child.line(_START_SECONDS))
        assert listening is not None
        self.address, endpoint = listening.groups()
        flags = ["--step-ms", step_ms, "--rows", rows, "--max-model-len", _MAX_MODEL_LEN]
        stack.enter_context(Child("shadow", python_module("benchmarks.shadow_executors", endpoint, *flags)))
        self._client = stack.enter_context(Client(self.address))
        self._client.wait_ready(_START_SECONDS)
        commands = {pid: command_line(pid) for pid in children(child.pid)}
        self.api_pids = [pid for pid, command in commands.items() if _API_MODULE in command]
        (self.engine_pid,) = [pid for pid, command in commands.items() if _ENGINE_MODULE in command]

    def cpu_seconds(self) -> tuple[float, float]:
        """Of all api processes together, and of the engine."""
        return sum(map(cpu_seconds, self.api_pids)), cpu_seconds(self.engine_pid)

    def executor(self) -> ExecutorStatus:
        """The shadow as the engine sees it."""
        (executor,) = self._client.cluster_status(timeout=_START_SECONDS).executors
        return executor


def measure(scheduler: Scheduler, args: argparse.Namespace, *, text: bool) -> dict[str, float]:
    """One measurement: the client's figures, and what they cost the scheduler."""
    flags = ["--streams", args.streams, "--connections", args.connections, "--seconds", args.seconds]
    flags += ["--max-tokens", _MAX_TOKENS]
    flags += ["--text" if text else "--no-text"]
    with Child("client", python_module("benchmarks.stream_client", scheduler.address, *flags)) as client:
        assert client.line(_START_SECONDS) == "measuring"
        before, began = scheduler.executor(), time.monotonic()
        load, (api, engine) = ForeignLoad(), scheduler.cpu_seconds()
        assert client.line(args.seconds + _START_SECONDS) == "measured"
        api_after, engine_after = scheduler.cpu_seconds()
        foreign, after, ended = load.cores(), scheduler.executor(), time.monotonic()
        figures: dict[str, float] = client.json(_START_SECONDS)
    api, engine = api_after - api, engine_after - engine
    tokens, messages = max(1.0, figures.pop("tokens")), max(1.0, figures.pop("messages"))
    steps = after.steps - before.steps
    return {
        **figures,
        "steps_per_s": steps / (ended - began),
        "starved_share": (after.starved_us - before.starved_us) / max(1, after.device_us - before.device_us),
        "api_cpu_share": api / args.seconds,
        "api_us_per_message": api / messages * 1e6,
        "api_us_per_token": api / tokens * 1e6,
        "engine_cpu_share": engine / args.seconds,
        "engine_us_per_message": engine / messages * 1e6,
        "engine_us_per_token": engine / tokens * 1e6,
        "foreign_cores": foreign or 0.0,
    }


def run(api_processes: int, args: argparse.Namespace) -> None:
    """Print a figure without text and one with it, taking turns."""
    done: dict[bool, list[dict[str, float]]] = {text: [] for text in args.text}
    note(f"{api_processes} api processes")
    with ExitStack() as stack:
        scheduler = Scheduler(stack, api_processes, args.step_ms, args.streams)
        for _ in range(args.runs):
            for text, runs in done.items():
                runs.append(measure(scheduler, args, text=text))
    for text, runs in done.items():
        medians = {name: median(one[name] for one in runs) for name in runs[0]}
        share = round(medians["tokens_per_s"] / (medians["steps_per_s"] * args.streams), 3)
        emit(bench="stream", api_processes=api_processes, text=text, delivered_share=share, runs=args.runs, **medians)


def main() -> None:
    """Print one JSON line per number of api processes, without and with text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=16, help="of the client; the kernel spreads them")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of each measurement")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--text", nargs="+", type=_on_off, default=[False, True], metavar="on|off", help="text in the answers"
    )
    args = parser.parse_args()
    emit(**environment("grpcio", "pyzmq", "protobuf"), streams=args.streams, step_ms=args.step_ms)
    for api_processes in args.api_processes:
        run(api_processes, args)


def _on_off(word: str) -> bool:
    return {"on": True, "off": False}[word]


if __name__ == "__main__":
    run_main(main)
