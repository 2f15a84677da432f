"""``python -m tests.simulation``: the whole system under faults, on a virtual clock. Failures replay by their seeds."""

import argparse
import json
import secrets
import sys
import time

from tests.simulation.running import EVENTS_PER_SEED, Report, SimulationError, simulate
from tests.simulation.world import Entry


def main() -> int:
    """Run what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one and tell its story")
    parser.add_argument("--request", default="", help="of the story, only what concerns this request (such as r12)")
    parser.add_argument("--events", type=int, default=EVENTS_PER_SEED, help="of trouble in each run")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to go on with fresh seeds")
    parser.add_argument("--seeds", type=int, default=0, help="so many runs instead of so many seconds")
    parser.add_argument("--first", type=int, default=None, help="the first seed; default: drawn and printed")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return _replay(arguments.seed, arguments.events, arguments.request)
    first = secrets.randbits(32) if arguments.first is None else arguments.first
    print(f"first seed {first}", file=sys.stderr, flush=True)
    return _explore(first, arguments.events, arguments.seeds, arguments.seconds)


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


def _explore(first: int, num_events: int, num_seeds: int, seconds: float) -> int:
    total = Report()
    deadline = time.monotonic() + seconds
    seed = first
    while (seed - first < num_seeds) if num_seeds else (time.monotonic() < deadline):
        total.add(simulate(seed, num_events)[0])
        seed += 1
    summary = {
        "first_seed": first,
        "seeds": seed - first,
        "events": total.num_events,
        "events_per_second": round(total.num_events / max(total.seconds, 1e-9)),
        "virtual_seconds": round(total.virtual_seconds, 1),
        "outcomes": dict(total.outcomes),
        "faults": dict(total.faults),
        "reached": dict(total.reached),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
