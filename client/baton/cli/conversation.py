"""The turns of a chat, and the answer that is being written."""

import time
from collections.abc import Iterator

from baton.cli.options import TIMEOUT_SECONDS
from baton.client import Client, Stream
from baton.errors import InvalidRequestError
from baton.options import GenerateOptions
from baton.values import ChatMessage, FinishReason


class Answer(Iterator[str]):
    """Iterate for the text as it comes, then close it; closing it early keeps what came so far.

    Attributes:
        text: what came so far.
        tokens: how many of them.
        finish_reason: why it ended; None as long as it has not, or when it was closed early.
    """

    def __init__(self, turns: list[ChatMessage], message: str, stream: Stream) -> None:
        self._turns = turns
        self._message = message
        self._stream = stream
        self._began: float | None = None  # when the first tokens came, in seconds of the monotonic clock
        self._first_tokens = 0
        self._seconds = 0.0
        self.text = ""
        self.tokens = 0
        self.finish_reason: FinishReason | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """The pace after the first tokens; None when that cannot be told."""
        later = self.tokens - self._first_tokens
        return later / self._seconds if later and self._seconds else None

    def __next__(self) -> str:
        """Raises StopIteration at the end of the turn, BatonError when the request fails."""
        try:
            delta = next(self._stream)
        except StopIteration:
            self.finish_reason = self._stream.completion.finish_reason
            raise
        now = time.monotonic()
        if self._began is None:
            self._began, self._first_tokens = now, len(delta.token_ids)
        self._seconds = now - self._began
        self.text += delta.text
        self.tokens += len(delta.token_ids)
        return delta.text

    def close(self) -> None:
        """Ends it and adds it to the turns, unless nothing came."""
        self._stream.close()
        if self.text:
            self._turns += [ChatMessage("user", self._message), ChatMessage("assistant", self.text)]


class Conversation:
    """What was said so far.

    Args:
        client: a cluster with a chat model.
        context: most tokens of a conversation and its answer.
        options: of every answer; ``max_tokens`` is lowered to what fits.
        system: the system message; empty = none.

    Attributes:
        system: it may change in between.
    """

    def __init__(self, client: Client, context: int, options: GenerateOptions, system: str) -> None:
        self._client = client
        self._context = context
        self._options = options
        self._turns: list[ChatMessage] = []
        self.system = system

    def reset(self) -> None:
        """Forgets the turns and keeps the system message."""
        self._turns = []

    def ask(self, message: str) -> Answer:
        """Sends a user's message with all that was said before.

        Raises:
            InvalidRequestError: nothing more fits into the context.
            BatonError: the cluster cannot be reached.
        """
        system = [ChatMessage("system", self.system)] if self.system else []
        prompt = [*system, *self._turns, ChatMessage("user", message)]
        room = self._context - len(self._client.tokenize(prompt, timeout=TIMEOUT_SECONDS))
        if room < 1:
            raise InvalidRequestError(f"the conversation fills the model's {self._context} tokens; /reset forgets it")
        max_tokens = min(self._options.get("max_tokens") or room, room)
        options: GenerateOptions = {**self._options, "max_tokens": max_tokens}
        return Answer(self._turns, message, self._client.stream(prompt, **options))
