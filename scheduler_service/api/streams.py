"""One request's output on its way from the engine to its caller."""

import asyncio
import time

from scheduler_service.api.errors import RequestError
from scheduler_service.api.messages import Finish


class OutputStream:
    """Tokens gather here until the reader takes them, all at once: a slow reader gets fewer, larger messages.

    One reader; written and read on the same event loop. It holds at most the request's ``max_tokens`` ids.

    Attributes:
        handle: the request's handle at the engine.
        submitted: whether the engine knows the request.
        ended: no more tokens will come.
        first_token_at: when the first token came, in seconds of the monotonic clock; 0 before that.
    """

    __slots__ = (
        "_error", "_finish", "_only_end", "_tokens", "_waiter", "ended", "first_token_at", "handle", "submitted",
    )  # fmt: skip

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.submitted = False
        self.ended = False
        self.first_token_at = 0.0
        self._tokens: list[int] = []
        self._finish: Finish | None = None
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._only_end = False  # the reader sleeps until the end rather than until the next token

    def push(self, token_id: int) -> None:
        """Append a token. Tokens after the end are dropped."""
        if self.ended:
            return
        if not self.first_token_at:
            self.first_token_at = time.monotonic()
        self._tokens.append(token_id)
        if self._waiter is not None and not self._only_end:
            self._wake()

    def finish(self, finish: Finish) -> None:
        """End well. The first end counts."""
        if not self.ended:
            self.ended = True
            self._finish = finish
            self._wake()

    def fail(self, error: RequestError) -> None:
        """End with an error, which the reader gets after the tokens that came before. The first end counts."""
        if not self.ended:
            self.ended = True
            self._error = error
            self._wake()

    async def take(self) -> tuple[list[int], Finish | None]:
        """Wait for tokens or the end; everything that has gathered, and how the request ended if it did.

        Raises:
            RequestError: the request failed and all tokens have been taken.
        """
        if not self._tokens and not self.ended:
            await self._sleep(only_end=False)
        tokens, self._tokens = self._tokens, []
        if self._error is not None:
            if not tokens:
                raise self._error
            return tokens, None
        return tokens, self._finish

    async def wait_end(self) -> None:
        """Wait until no more tokens will come, without waking for each of them."""
        if not self.ended:
            await self._sleep(only_end=True)

    async def _sleep(self, *, only_end: bool) -> None:
        self._only_end = only_end
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
