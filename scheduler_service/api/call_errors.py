"""How a call ends when its handler raises."""

import asyncio
import logging
import secrets
from types import TracebackType

import grpc

from scheduler_service.api import generation_wire as wire
from scheduler_service.api.errors import RequestError
from scheduler_service.api.outlet import Context

_log = logging.getLogger("baton.api")


class CallErrors:
    """Ends a call with the right status when its handler raises: ``async with CallErrors(context)``."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, RequestError):
            await self._context.abort_with_status(wire.encode_error(error))
        if isinstance(error, ConnectionError):
            raise asyncio.CancelledError from error  # there is nobody left to tell
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
            await self._context.abort(grpc.StatusCode.INTERNAL, describe_bug(error))


def describe_bug(error: Exception) -> str:
    """What a caller is told of an error that nobody expected; the log has the rest, under the same reference."""
    reference = secrets.token_hex(4)
    _log.error("unexpected error, reference %s", reference, exc_info=error)
    return f"internal error, reference {reference}"
