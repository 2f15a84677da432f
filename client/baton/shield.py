"""Calls that start whole, whatever signals come.

gRPC loses count of a call when an exception breaks off its start: a signal handler's, such as KeyboardInterrupt. Its
channel then waits for such a call for ever when it is closed, and may forget to wait for the next. Such exceptions come
to the main thread only, so calls start in another.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class ShieldedChannel:
    """The part of a ``grpc.Channel`` that stubs need for unary requests. Unary answers come as futures."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def unary_unary(self, *arguments: Any, **options: Any) -> "ShieldedUnary":
        """As ``grpc.Channel.unary_unary``, for ``future`` only."""
        return ShieldedUnary(self._channel.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """As ``grpc.Channel.unary_stream``."""
        start = self._channel.unary_stream(*arguments, **options)
        return lambda *request, **details: _whole(lambda: start(*request, **details))

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._channel.close()


class ShieldedUnary:
    """A method with one request and one answer."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def future(self, *request: Any, **details: Any) -> Any:
        """Starts a call; see ``grpc.UnaryUnaryMultiCallable.future``."""
        return _whole(lambda: self._method.future(*request, **details))


def _whole(start: Callable[[], Any]) -> Any:
    if threading.current_thread() is not threading.main_thread():
        return start()
    started: Future[Any] = Future()
    threading.Thread(target=_run, args=(start, started), name="start of a call", daemon=True).start()
    return started.result()  # interrupted here, the last reference goes with the thread, and gRPC cancels the call


def _run(start: Callable[[], Any], started: Future[Any]) -> None:
    try:
        started.set_result(start())
    except Exception as error:
        started.set_exception(error)
