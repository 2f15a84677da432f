"""``python -m scheduler_service.api '<ProcessSpec as JSON>'``, started by the launcher."""

import asyncio
import logging
import os
import signal
import sys

from scheduler_service.process import die_with_parent


def main() -> int:
    """Run one api process; the exit code."""
    die_with_parent()
    # The launcher turns an interrupt into SIGTERM, in its order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One prompt at a time on each of our threads: the library's own pool would compete with the engine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from scheduler_service.api.server import serve
    from scheduler_service.config import ProcessSpec

    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} '<ProcessSpec as JSON>'", file=sys.stderr)
        return 2
    spec = ProcessSpec.model_validate_json(sys.argv[1])
    logging.basicConfig(level=spec.settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return asyncio.run(serve(spec))
    except (OSError, ValueError, RuntimeError) as error:
        logging.getLogger("baton.api").error("cannot serve: %s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
