"""One sample's output on its way from the engine to its reader."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler_service.api.errors import RequestError
from scheduler_service.api.messages import Finish, TokenLogprob


@dataclass(slots=True)  # frozen ones take three times as long to make, and there is one for every message
class News:
    """What gathered in a stream since the last look.

    Attributes:
        logprobs: one per token id where the request asked for them, else empty.
        prompt_logprobs: all that are known by now; None = as at the last look.
        best_effort: tokens from here on may be rounded otherwise than those before.
        finish: None while the sample goes on.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob] | None
    best_effort: bool
    finish: Finish | None


class Inbox:
    """Where the one reader of a request waits for news of any of its streams. Used on one event loop.

    Attributes:
        patient: the reader sleeps until a sample ends rather than until the next token.
    """

    __slots__ = ("_error", "_ready", "_waiter", "patient")

    def __init__(self) -> None:
        self.patient = False
        self._ready: deque[OutputStream] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: RequestError | None = None

    def add(self, stream: "OutputStream", *, urgent: bool) -> None:
        """There is news in ``stream``; it may wait for a patient reader unless it is ``urgent``."""
        self._ready.append(stream)
        if urgent or not self.patient:
            self.wake()

    def close(self, error: RequestError) -> None:
        """The reader gets nothing but this error from now on."""
        self._error = error
        self.wake()

    async def next(self) -> "OutputStream":
        """Wait for a stream with news, in the order in which they came.

        Raises:
            RequestError: the inbox was closed.
        """
        while self._error is None and (not self._ready or (self.patient and not self._any_ended())):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error
        return self._ready.popleft()

    def wake(self) -> None:
        """Let the reader look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _any_ended(self) -> bool:
        return any(stream.ended for stream in self._ready)


class OutputStream:
    """Tokens gather here until the reader takes them, all at once: a slow reader gets fewer, larger messages.

    Written and read on the same event loop. It holds at most the request's ``max_tokens`` ids.

    Attributes:
        handle: the sample's handle at the engine.
        submitted: whether the engine knows the sample.
        held: whether the engine was told that the reader does not keep up.
        ended: no more tokens will come.
        first_token_at: when the first token came, in seconds of the monotonic clock; 0 before that.
        ended_at: when the end came, likewise.
        arrivals: when tokens came, likewise, and how many there were by then; None = nobody asks.
    """

    __slots__ = (
        "_best_effort", "_error", "_finish", "_first", "_inbox", "_keep", "_logprobs", "_noted", "_prompt_logprobs",
        "_prompt_news", "_taken", "_tokens", "arrivals", "ended", "ended_at", "first_token_at", "handle", "held",
        "submitted",
    )  # fmt: skip

    def __init__(
        self, handle: int, inbox: Inbox, *, resumed: int = 0, keep: bool = False, note_arrivals: bool = False
    ) -> None:
        """Create a stream.

        Args:
            handle: see above.
            inbox: the reader's.
            resumed: tokens that the sample has already; the first that comes is the one after them.
            keep: keep what has been taken, for ``rewind``.
            note_arrivals: fill ``arrivals``.
        """
        self.handle = handle
        self.submitted = False
        self.held = False
        self.ended = False
        self.first_token_at = 0.0
        self.ended_at = 0.0
        self.arrivals: list[tuple[float, int]] | None = [] if note_arrivals else None
        self._inbox = inbox
        self._keep = keep
        self._noted = False  # the inbox has this stream already
        self._first = resumed  # absolute index of _tokens[0]
        self._tokens: list[int] = []
        self._taken = 0  # of _tokens
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._prompt_news = False
        self._best_effort = False
        self._finish: Finish | None = None
        self._error: RequestError | None = None

    @property
    def unread(self) -> int:
        """Tokens that nobody has taken yet."""
        return len(self._tokens) - self._taken

    @property
    def patient(self) -> bool:
        """Whether the reader wants nothing before the end."""
        return self._inbox.patient

    @property
    def taken_logprob(self) -> float:
        """Sum of the log probabilities of what has been taken and is kept."""
        return sum(one.logprob for one in self._logprobs[: self._taken])

    def push(self, token_id: int, now: float, logprob: TokenLogprob | None = None) -> int:
        """Append a token that came at ``now``, in seconds of the monotonic clock; how many are unread now.

        After the end it is dropped.
        """
        if self.ended:
            return 0
        if not self.first_token_at:
            self.first_token_at = now
        self._tokens.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        if self.arrivals is not None:
            self._note_arrival(now, self.arrivals)
        if not self._noted:
            self._note(urgent=False)
        return len(self._tokens) - self._taken

    def push_prompt(self, logprobs: Sequence[TokenLogprob]) -> None:
        """Append log probabilities of the prompt's next tokens."""
        if not self.ended:
            self._prompt_logprobs += logprobs
            self._prompt_news = True
            self._note(urgent=False)

    def mark_best_effort(self) -> None:
        """The tokens that come next are from an executor that may round otherwise than the last one."""
        self._best_effort = True

    def finish(self, finish: Finish) -> None:
        """End well. The first end counts."""
        if not self.ended:
            self._finish = finish
            self._end()

    def fail(self, error: RequestError) -> None:
        """End with an error, which the reader gets after the tokens that came before. The first end counts."""
        if not self.ended:
            self._error = error
            self._end()

    def nudge(self) -> None:
        """Have the reader look here though nothing came."""
        self._note(urgent=False)

    def take(self) -> News:
        """Everything that has gathered; a reader has to look again after tokens that came before an error.

        Raises:
            RequestError: the sample failed and all tokens have been taken.
        """
        self._noted = False
        tokens, logprobs = self._tokens, self._logprobs
        if self._keep:
            tokens, logprobs = tokens[self._taken :], logprobs[self._taken :]
        if self._error is not None:
            if not tokens:
                raise self._error
            self._note(urgent=True)
        prompt_logprobs = self._prompt_logprobs if self._prompt_news else None
        news = News(tokens, logprobs, prompt_logprobs, self._best_effort and bool(tokens), self._finish)
        self._prompt_news = False
        self._best_effort = self._best_effort and not tokens
        if self._keep:
            self._taken = len(self._tokens)
        else:
            self._first += len(tokens)
            self._tokens = []
            if logprobs:
                self._logprobs = []
        return news

    def agrees_with(self, token_ids: Sequence[int]) -> bool:
        """Whether ``token_ids`` are the sample's first as far as they are known here. For streams that keep them."""
        mine = self._tokens[: max(0, len(token_ids) - self._first)]
        return list(token_ids[self._first : self._first + len(mine)]) == mine

    def reaches(self, num_tokens: int) -> bool:
        """Whether a reader who has ``num_tokens`` can go on here: neither too few are kept nor too few have come."""
        return self._first <= num_tokens <= self._first + len(self._tokens)

    def rewind(self, num_tokens: int, inbox: Inbox) -> None:
        """Go to where ``num_tokens`` have been taken, for another reader. Only to where it ``reaches``."""
        self._inbox = inbox
        self._taken = num_tokens - self._first
        self._prompt_news = bool(self._prompt_logprobs)
        self._noted = False
        if self.ended or self.unread or self._prompt_news:
            self._note(urgent=True)

    def _end(self) -> None:
        self.ended = True
        self.ended_at = time.monotonic()
        self._note(urgent=True)

    def _note(self, *, urgent: bool) -> None:
        if not self._noted:
            self._noted = True
            self._inbox.add(self, urgent=urgent)
        elif urgent:
            self._inbox.wake()

    def _note_arrival(self, now: float, arrivals: list[tuple[float, int]]) -> None:
        count = self._first + len(self._tokens)
        if arrivals and arrivals[-1][0] == now:
            arrivals[-1] = (now, count)
        else:
            arrivals.append((now, count))
