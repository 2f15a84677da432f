"""``python -m scheduler_service.engine '<ProcessSpec as JSON>'``, started by the launcher."""

import signal
import sys

import zmq

from scheduler_service.config import ProcessSpec
from scheduler_service.engine.loop import EngineLoop
from scheduler_service.engine.sockets import bind_router, bound_endpoint
from scheduler_service.process import configure_logging, die_with_parent

_API_QUEUE = 100_000  # frames; an api process that lags further behind is given up
_EXECUTOR_QUEUE = 1_000


def main() -> int:
    """Run the engine; prints the executors' endpoint on stdout once it is bound. The exit code."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher turns an interrupt into SIGTERM, in its order
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} '<ProcessSpec as JSON>'", file=sys.stderr)
        return 2
    spec = ProcessSpec.model_validate_json(sys.argv[1])
    configure_logging(spec.settings.log_level)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        api = bind_router(context, spec.engine_endpoint, _API_QUEUE)
        executors = bind_router(context, spec.settings.executor_endpoint, _EXECUTOR_QUEUE)
    except zmq.ZMQError as error:
        reason = zmq.strerror(error.errno or 0)
        print(f"error: cannot listen on {spec.settings.executor_endpoint}: {reason}", file=sys.stderr)
        return 2
    loop = EngineLoop(spec, api, executors)
    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    print(bound_endpoint(executors), flush=True)
    loop.run()
    context.destroy(linger=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
