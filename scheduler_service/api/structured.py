"""Structured output: from what a caller asks the text to be to one grammar that is known to compile."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import grpc

from scheduler_service.api.errors import RequestError, invalid
from scheduler_service.api.request import StructuredKind, StructuredOutput
from scheduler_service.api.rules import RequestLimits, few
from scheduler_service.api.structured_pool import Grammar, Refusal, Verdict, WorkerPool

_FIELD = "sampling.structured"
_MAX_BYTES = {
    StructuredKind.JSON_SCHEMA: 64 * 1024,
    StructuredKind.JSON_OBJECT: 0,
    StructuredKind.REGEX: 16 * 1024,
    StructuredKind.CHOICE: 16 * 1024,
    StructuredKind.GRAMMAR: 64 * 1024,
}
_MAX_REMEMBERED = 256


class GrammarChecker:
    """Turns structured outputs into checked llguidance grammars, and remembers them. To be used on one event loop."""

    def __init__(self, pool: WorkerPool | None) -> None:
        """``pool`` compiles; None where the checkpoint does not go with grammars."""
        self._pool = pool
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[Verdict]] = {}

    @classmethod
    def of_checkpoint(cls, folder: Path, eos_token_ids: Sequence[int], timeout: float) -> "GrammarChecker":
        """A checker for the tokenizer in ``folder``; compiling one grammar may take ``timeout`` seconds."""
        tokenizer = folder / "tokenizer.json"
        if not eos_token_ids or not tokenizer.exists():
            return cls(None)
        return cls(WorkerPool(tokenizer, eos_token_ids, timeout))

    async def check(self, structured: StructuredOutput) -> str:
        """The grammar of ``structured``; it has been compiled once, within the limits of time and memory.

        Raises:
            RequestError: INVALID_ARGUMENT naming the field: it is too large, does not compile, or not within the
                limits; FAILED_PRECONDITION: the served model's tokenizer does not go with grammars;
                RESOURCE_EXHAUSTED: too many wait already; UNAVAILABLE: the process that compiles does not start.
        """
        check_size(structured)
        if self._pool is None:
            message = "the served model has no tokenizer with an end-of-sequence token"
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, _FIELD, message)
        match await self._verdict(structured, self._pool):
            case Grammar(text):
                return text
            case Refusal(reason, _):
                raise invalid(_field(structured), reason)

    async def are_over(self, grammar: str, outputs: Sequence[Sequence[int]]) -> list[bool]:
        """Of each of ``outputs``, token ids, whether it is a whole text of a grammar that ``check`` gave, which nothing
        can follow. All together have the time that compiling a grammar has.

        Raises:
            RequestError: RESOURCE_EXHAUSTED: too many wait already; UNAVAILABLE: the process does not start.
        """
        if self._pool is None or not outputs:
            return [False] * len(outputs)
        return await self._pool.are_over(Grammar(grammar), outputs)

    async def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            await self._pool.close()

    async def _verdict(self, structured: StructuredOutput, pool: WorkerPool) -> Verdict:
        key = _digest(structured)
        if (verdict := self._verdicts.get(key)) is not None:
            self._verdicts.move_to_end(key)
            return verdict
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(pool.compile(structured))
            task.add_done_callback(lambda done: self._remember(key, done))
        # Others may wait for the same grammar: a caller who leaves does not take it with it.
        return await asyncio.shield(task)

    def _remember(self, key: bytes, task: asyncio.Task[Verdict]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        verdict = task.result()
        if isinstance(verdict, Refusal) and not verdict.is_certain:
            return
        self._verdicts[key] = verdict
        if len(self._verdicts) > _MAX_REMEMBERED:
            self._verdicts.popitem(last=False)


def check_size(structured: StructuredOutput) -> None:
    """Refuse what is empty, or larger than a request may bring.

    Raises:
        RequestError: INVALID_ARGUMENT naming the field.
    """
    field, texts, limit = _field(structured), structured.texts, _MAX_BYTES[structured.kind]
    if structured.kind is not StructuredKind.JSON_OBJECT and not (texts and all(texts)):
        raise invalid(field, "must not be empty")
    few(field, texts, RequestLimits.max_choices)
    if (size := sum(len(text.encode()) for text in texts)) > limit:
        raise invalid(field, f"is {size} bytes long; at most {limit} bytes are allowed")


def _field(structured: StructuredOutput) -> str:
    return f"{_FIELD}.{structured.kind.value}"


def _digest(structured: StructuredOutput) -> bytes:
    digest = hashlib.sha256(structured.kind.value.encode())
    for text in structured.texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
