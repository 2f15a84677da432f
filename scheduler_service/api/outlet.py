"""Writing to a client that may not be reading."""

import asyncio
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc

from scheduler_service.api.errors import RETRY_SOON, RequestError

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_MESSAGE_SECONDS = 100e-6  # what a message costs both ends, generously
_LEAST_PAUSE_SECONDS = 2e-3  # with up to 20 streams every token goes out at once


async def let_tokens_gather(num_streams: int) -> None:
    """Space out the messages of each stream while many streams share this process.

    Writing returns once gRPC has buffered a message, so a reader that lags does not hold the writer back: without
    this, a busy process would send ever more messages of one token and fall behind.
    """
    pause = num_streams * _MESSAGE_SECONDS
    if pause > _LEAST_PAUSE_SECONDS:
        await asyncio.sleep(pause)


class Outlet:
    """Writes the messages of one call: ``async with Outlet(context, patience) as outlet``.

    Writing returns once gRPC has room for the message, which it has not while the client leaves too much unread. The
    tokens gather in the request's streams meanwhile; the block ends with RESOURCE_EXHAUSTED when a single message
    could not be written for ``patience`` seconds.
    """

    def __init__(self, context: Context, patience: float) -> None:
        self._context = context
        self._patience = patience
        self._limit = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()

    async def write(self, message: object) -> None:
        """Write a message.

        Raises:
            ConnectionError: the client has gone. Whether this or the cancellation of the call comes first is chance.
        """
        self._limit.reschedule(self._loop.time() + self._patience)
        try:
            await self._context.write(message)
        except grpc.aio.InternalError as error:
            raise ConnectionError("the client has gone") from error
        self._limit.reschedule(None)

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._limit.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "",
                f"the stream was not read for {self._patience:g} s",
                retry_after=RETRY_SOON,
            ) from None
