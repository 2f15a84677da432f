"""``python -m benchmarks.kill_test``: kill executors, or schedulers, under load; every stream must come out the same.

First every case runs without faults. Then all streams run while faults happen, each at a random token of a random
stream. Prints one JSON line per figure; exit code 1 when a stream failed or differs.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from baton.checkpoints import TINY_PYTHON
from benchmarks.environment import environment
from benchmarks.figures import emit, run_main
from benchmarks.kill_test.cases import cases
from benchmarks.kill_test.cluster import KillableCluster, Settings
from benchmarks.kill_test.faults import KINDS
from benchmarks.kill_test.run import Plan, run


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY_PYTHON)
    parser.add_argument("--schedulers", type=int, default=1)
    parser.add_argument("--executors", type=int, default=4)
    parser.add_argument("--api-processes", type=int, default=1)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=72, help="of the shortest streams")
    parser.add_argument("--kill", dest="kinds", default="kill", help=f"kinds of faults, of {', '.join(KINDS)}")
    parser.add_argument("--round-trip-ms", type=float, default=0.0, help="added between schedulers and executors")
    parser.add_argument("--loss", type=float, default=0.0, help="share of messages lost between them, 0 to 1")
    parser.add_argument("--only", default="", help="sets of parameters, separated by commas; default: all")
    parser.add_argument("--gap", type=float, default=1.0, help="least seconds between faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-level", default="error")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    settings = Settings(
        model=args.model,
        schedulers=args.schedulers,
        executors=args.executors,
        api_processes=args.api_processes,
        num_blocks=2000,
        max_rows=64,
        log_level=args.log_level,
        proxies=bool({"cut", "silence"} & set(kinds)) or args.round_trip_ms > 0 or args.loss > 0,
        delay=args.round_trip_ms / 2e3,
        loss=args.loss,
    )
    wanted = [case for case in cases(args.max_tokens) if not args.only or case.name in args.only.split(",")]
    emit(**environment(), arguments={name: str(value) for name, value in vars(args).items()})
    with KillableCluster(settings) as cluster:
        plan = Plan(wanted, args.streams, args.faults, kinds, args.concurrency, args.seed, args.gap)
        verdict, refused = asyncio.run(run(cluster, plan))
    emit(refused_cases=refused)
    emit(**verdict.figures())
    sys.exit(0 if verdict.is_clean else 1)


if __name__ == "__main__":
    run_main(main)
