"""Who calls: bearer tokens, checked once for all services."""

import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from scheduler_service.tokens import TokenFileError, load_tokens

_log = logging.getLogger("baton.api")

_LOOK_INTERVAL = 1.0  # seconds
_HEADER = "authorization"
_SCHEME = "bearer "
# Probes and tools cannot send tokens; neither service tells anything of anybody's requests.
_EXEMPT = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
_OPERATORS_ONLY = ("/baton.v1.Admin/",)
OPERATOR = "operator"  # the tenant that may move executors about

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Details: TypeAlias = "grpc.HandlerCallDetails"
_Continuation: TypeAlias = Callable[[_Details], Awaitable["grpc.RpcMethodHandler[Any, Any]"]]

_tenant: ContextVar[str] = ContextVar("tenant", default="")


def tenant_of(context: Context) -> str:
    """The tenant whose token the call of ``context`` bears; empty where no tokens are asked for.

    Only to be asked in the task that handles the call: that is where the interceptor has noted it.
    """
    return _tenant.get()


class TokenFile:
    """The tokens in a file, read again when it has changed. A file that turns bad changes nothing."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            TokenFileError: it cannot be used.
        """
        self._path = path
        self._clock = clock
        self._version = _version(path)
        self._tokens = load_tokens(path)
        self._next_look = clock() + _LOOK_INTERVAL

    def tenant(self, token: str) -> str | None:
        """The tenant of a token; None if it is nobody's."""
        if self._clock() >= self._next_look:
            self._look()
        return self._tokens.tenant(token)

    def _look(self) -> None:
        self._next_look = self._clock() + _LOOK_INTERVAL
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._tokens = load_tokens(self._path)
        except TokenFileError as error:
            _log.error("the tokens stay as they were: %s", error)
        else:
            _log.info("%d tokens are valid now", len(self._tokens))


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets calls through that bear a valid token and notes their tenant; all others end UNAUTHENTICATED, unread."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        # Of a kind that reads no message: a caller without a token gets an answer without being listened to.
        self._unauthenticated = grpc.stream_stream_rpc_method_handler(_refuse_stranger)
        self._forbidden = grpc.stream_stream_rpc_method_handler(_refuse_tenant)

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: _Details
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """See grpc.aio.ServerInterceptor."""
        if handler_call_details.method.startswith(_EXEMPT):
            return await continuation(handler_call_details)
        tenant = self._tokens.tenant(_bearer_token(handler_call_details))
        if tenant is None:
            return self._unauthenticated
        if handler_call_details.method.startswith(_OPERATORS_ONLY) and tenant != OPERATOR:
            return self._forbidden
        _tenant.set(tenant)  # a call has a task, and with it a context, of its own
        return await continuation(handler_call_details)


async def _refuse_tenant(_: object, context: Context) -> None:
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"only the tenant {OPERATOR!r} may do this")


async def _refuse_stranger(_: object, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid token is needed: authorization: Bearer <token>")


def _bearer_token(details: _Details) -> str:
    for key, value in details.invocation_metadata or ():
        if key == _HEADER and isinstance(value, str) and value[: len(_SCHEME)].lower() == _SCHEME:
            return value[len(_SCHEME) :].strip()
    return ""


def _version(path: Path) -> tuple[int, ...]:
    """Changes whenever the file does; empty when there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size
