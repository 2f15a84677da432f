"""``python -m scheduler_service.engine '<ProcessSpec as JSON>'``, started by the launcher."""

import signal
import sys
from contextlib import ExitStack

import zmq

from scheduler_service.config import ProcessSpec
from scheduler_service.engine.loop import EngineLoop
from scheduler_service.engine.sockets import Router, bind_router, bound_endpoint
from scheduler_service.process import configure_logging, die_with_parent

_API_QUEUE = 100_000  # frames; an api process that lags further behind is given up
_EXECUTOR_QUEUE = 1_000


class StartError(Exception):
    """The engine cannot serve; the message is one line."""


def main() -> int:
    """Run the engine; prints the executors' endpoint on stdout once it is bound. The exit code."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher turns an interrupt into SIGTERM, in its order
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} '<ProcessSpec as JSON>'", file=sys.stderr)
        return 2
    spec = ProcessSpec.model_validate_json(sys.argv[1])
    configure_logging(spec.settings.log_level, spec.settings.log_format)
    with ExitStack() as stack:
        context: zmq.Context[Router] = zmq.Context()
        stack.callback(context.destroy, linger=100)
        try:
            loop, endpoint = _build(spec, context, stack)
        except StartError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        print(endpoint, flush=True)
        loop.run()
    return 0


def _build(spec: ProcessSpec, context: "zmq.Context[Router]", stack: ExitStack) -> tuple[EngineLoop, str]:
    settings = spec.settings
    curve, allowed = None, None
    if settings.curve_key is not None and settings.executor_keys is not None:
        from scheduler_service.engine import curve as keys  # loads what an engine without keys never needs

        try:
            curve, allowed = keys.load_key(settings.curve_key), keys.AllowList(settings.executor_keys)
        except keys.KeyFileError as error:
            raise StartError(str(error)) from error
        stack.callback(allowed.close)
        stack.enter_context(keys.authenticator(context, allowed))
    try:
        api = bind_router(context, spec.engine_endpoint, _API_QUEUE)
        executors = bind_router(context, settings.executor_endpoint, _EXECUTOR_QUEUE, curve)
    except zmq.ZMQError as error:
        reason = zmq.strerror(error.errno or 0)
        raise StartError(f"cannot listen on {settings.executor_endpoint}: {reason}") from error
    return EngineLoop(spec, api, executors, executor_keys=allowed), bound_endpoint(executors)


if __name__ == "__main__":
    sys.exit(main())
