"""``python -m tests.fuzz``: hostile messages into the real decoders and state machines, and through real sockets.

Progress goes to stderr, one JSON line with the outcome to stdout; exit code 1 and a traceback when something gave in.
"""

import argparse
import json
import logging
import secrets
import sys
import time
from collections.abc import Callable

from tests.fuzz.in_process import TARGETS, run
from tests.fuzz.sockets import SocketTarget

_PROGRESS_SECONDS = 5.0


def main() -> int:
    """Run what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000, help="in process, over all targets")
    parser.add_argument("--socket-messages", type=int, default=100_000, help="through sockets, with and without keys")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="default: drawn and printed")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # every hostile frame would be worth a line
    began = time.monotonic()
    print(f"seed {arguments.seed}", file=sys.stderr)
    served, sent = {}, {}
    for name in TARGETS:
        wanted = arguments.messages // len(TARGETS)
        sent[name], served[name] = run(name, arguments.seed, wanted, _progress(name, wanted))
    for protected in (False, True):
        name, wanted = f"sockets {'with' if protected else 'without'} keys", arguments.socket_messages // 2
        if wanted:
            target = SocketTarget(arguments.seed, protected=protected)
            try:
                target.run(wanted, _progress(name, wanted))
            finally:
                target.close()
            sent[name], served[name] = wanted, target.served
    summary = {
        "seed": arguments.seed,
        "messages": sent,
        "neighbours_served": served,
        "crashes": 0,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(summary))
    return 0


def _progress(name: str, wanted: int) -> Callable[[int], None]:
    """Tells now and then how far it has come."""
    next_at = time.monotonic() + _PROGRESS_SECONDS

    def tell(done: int) -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + _PROGRESS_SECONDS
            print(f"{name}: {done} of {wanted}", file=sys.stderr, flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main())
