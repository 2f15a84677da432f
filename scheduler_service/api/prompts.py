"""Prompts to token ids, large ones away from the event loop."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from scheduler_service.api.chat_template import ChatTemplate
from scheduler_service.api.errors import RequestError, overloaded
from scheduler_service.api.request import ChatPrompt, Prompt, TextPrompt
from scheduler_service.api.tokenizer import ModelTokenizer

# Below this a hop to a thread costs more than the work itself.
_INLINE_BYTES = 2048
_MAX_PENDING_BYTES = 256 * 1024 * 1024

T = TypeVar("T")


class PromptEncoder:
    """Turns any kind of prompt into token ids. Safe to use from several threads."""

    def __init__(self, tokenizer: ModelTokenizer | None, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    def encode(self, prompt: Prompt, max_chars: int) -> NDArray[np.int64]:
        """Token ids of ``prompt``; a rendered conversation may have at most ``max_chars`` characters.

        Raises:
            RequestError: FAILED_PRECONDITION where the checkpoint lacks a tokenizer or a chat template;
                INVALID_ARGUMENT where the chat template refuses the conversation.
        """
        if isinstance(prompt, TextPrompt):
            tokenizer = self._require_tokenizer("text")
            return np.array(tokenizer.encode(prompt.text, add_special_tokens=True), dtype=np.int64)
        if isinstance(prompt, ChatPrompt):
            tokenizer = self._require_tokenizer("chat")
            if self._chat_template is None:
                raise _missing("chat", "the served model has no chat template")
            text = self._chat_template.render(prompt, max_chars)
            # The template has written the special tokens already.
            return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
        return np.fromiter(prompt.ids, dtype=np.int64, count=len(prompt.ids))

    def _require_tokenizer(self, field: str) -> ModelTokenizer:
        if self._tokenizer is None:
            raise _missing(field, "the served model has no tokenizer; send token ids")
        return self._tokenizer


class PromptPool:
    """A few threads for large prompts, with a bound on the bytes that wait for them."""

    def __init__(self, threads: int = 2, max_pending_bytes: int = _MAX_PENDING_BYTES) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="prompt")
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        self._lock = threading.Lock()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do ``work`` on a prompt of ``size`` bytes: here if it is small, on a thread otherwise.

        Raises:
            RequestError: RESOURCE_EXHAUSTED, too much waits already; and whatever ``work`` raises.
        """
        if size <= _INLINE_BYTES:
            return work()
        with self._lock:
            if self._pending_bytes + size > self._max_pending_bytes:
                raise overloaded("too many large prompts wait to be tokenised")
            self._pending_bytes += size
        future = self._executor.submit(work)
        future.add_done_callback(lambda done: self._release(done, size))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Start nothing more; what runs is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _release(self, _done: Future[T], size: int) -> None:
        with self._lock:
            self._pending_bytes -= size


def _missing(field: str, message: str) -> RequestError:
    return RequestError(grpc.StatusCode.FAILED_PRECONDITION, field, message)
