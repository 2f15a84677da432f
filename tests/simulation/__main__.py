"""``python -m tests.simulation``: the whole system under faults, on a virtual clock. Failures replay by their seeds."""

import argparse
import json
import secrets
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from tests.simulation.running import EVENTS_PER_SEED, Report, SimulationError, simulate
from tests.simulation.world import Entry


def main() -> int:
    """Run what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one and tell its story")
    parser.add_argument("--request", default="", help="of the story, only what concerns this request (such as r12)")
    parser.add_argument("--events-per-run", type=int, default=EVENTS_PER_SEED, help="of trouble, before it gets calm")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to go on with fresh seeds")
    parser.add_argument("--seeds", type=int, default=0, help="so many runs instead of so many seconds")
    parser.add_argument("--events", type=int, default=0, help="so many events, over all runs, instead of seconds")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the seeds")
    parser.add_argument("--first", type=int, default=None, help="the first seed; default: drawn and printed")
    parser.add_argument("--stride", type=int, default=1, help="from one seed to the next")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return _replay(arguments.seed, arguments.events_per_run, arguments.request)
    if arguments.first is None:
        arguments.first = secrets.randbits(32)
    if arguments.stride == 1:
        print(f"first seed {arguments.first}", file=sys.stderr, flush=True)
    if arguments.workers > 1:
        return _share(arguments)
    _explore(arguments)
    return 0


def _share(arguments: argparse.Namespace) -> int:
    """Let workers run disjoint seeds; the exit code. When one of them fails, so does everything, with its words."""
    count = arguments.workers
    command = [sys.executable, "-m", "tests.simulation", "--stride", str(count)]
    for name, value in (
        ("--events-per-run", arguments.events_per_run),
        ("--seconds", arguments.seconds),
        ("--seeds", -(-arguments.seeds // count)),
        ("--events", -(-arguments.events // count)),
    ):
        command += [name, str(value)]
    workers = [
        subprocess.Popen([*command, "--first", str(arguments.first + index)], stdout=subprocess.PIPE, text=True)
        for index in range(count)
    ]
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                return 1
            time.sleep(0.2)
        if any(worker.returncode for worker in workers):
            return 1
        summaries = [json.loads(worker.communicate()[0]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    total: dict[str, Any] = {"first_seed": arguments.first}
    for summary in summaries:
        for key, value in summary.items():
            if isinstance(value, dict):
                total[key] = dict(Counter(total.get(key, {})) + Counter(value))
            elif key != "first_seed":
                total[key] = round(total.get(key, 0) + value, 1)
    print(json.dumps(total))
    return 0


def _replay(seed: int, num_events: int, request: str) -> int:
    try:
        report, story = simulate(seed, num_events, tells=True)
        problem = None
    except SimulationError as error:
        story, problem = error.story, error
    _tell(story, request)
    if problem is not None:
        raise problem
    print(f"{report.num_events} events, {dict(report.outcomes)}", file=sys.stderr)
    return 0


def _tell(story: list[Entry], request: str) -> None:
    for entry in story:
        if not request or request in entry.requests or not entry.requests:
            print(f"{entry.time:12.6f} {entry.who:20} {entry.what}")


def _explore(arguments: argparse.Namespace) -> None:
    """Run seeds and print what they came to.

    Raises:
        SimulationError: with the seed that failed.
    """
    total = Report()
    deadline = time.monotonic() + arguments.seconds

    def goes_on() -> bool:
        if arguments.seeds:
            return len(total.seeds) < arguments.seeds
        return total.num_events < arguments.events if arguments.events else time.monotonic() < deadline

    while goes_on():
        total.add(simulate(arguments.first + len(total.seeds) * arguments.stride, arguments.events_per_run)[0])
    summary = {
        "first_seed": arguments.first,
        "seeds": len(total.seeds),
        "events": total.num_events,
        "events_per_second": round(total.num_events / max(total.seconds, 1e-9)),
        "virtual_seconds": round(total.virtual_seconds, 1),
        "outcomes": dict(total.outcomes),
        "faults": dict(total.faults),
        "reached": dict(total.reached),
    }
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    sys.exit(main())
