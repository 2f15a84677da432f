"""``python -m scheduler_service.api '<ProcessSpec as JSON>'``, started by the launcher."""

import asyncio
import logging
import os
import signal
import sys

from scheduler_service.process import configure_logging, die_with_parent


def main() -> int:
    """Run one api process; the exit code."""
    die_with_parent()
    # The launcher turns an interrupt into SIGTERM, in its order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One prompt at a time on each of our threads: the library's own pool would compete with the engine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Else gRPC logs every handshake that fails, as often as strangers please.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from scheduler_service.api.server import serve
    from scheduler_service.config import ProcessSpec

    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} '<ProcessSpec as JSON>'", file=sys.stderr)
        return 2
    spec = ProcessSpec.model_validate_json(sys.argv[1])
    configure_logging(spec.settings.log_level, spec.settings.log_format)
    try:
        return asyncio.run(serve(spec))
    except (OSError, ValueError, RuntimeError) as error:
        logging.getLogger("baton.api").error("cannot serve: %s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
