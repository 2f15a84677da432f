"""A few processes that compile grammars, each of which is killed when it takes too long."""

import asyncio
import json
import logging
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from scheduler_service.api.errors import RequestError, overloaded, unavailable
from scheduler_service.api.request import StructuredOutput

_log = logging.getLogger("baton.api")

_MODULE = "scheduler_service.api.structured_worker"
_START_SECONDS = 60.0  # the library reads the whole vocabulary
_MAX_WORKERS = 2
_MAX_BYTES = 512 * 1024 * 1024
_MAX_WAITING = 64
_MAX_LINE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Grammar:
    """An llguidance grammar that compiles."""

    text: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no grammar, for the caller; ``is_certain`` unless a second try might find more time or memory."""

    reason: str
    is_certain: bool = True


Verdict = Grammar | Refusal


class _WorkerDiedError(Exception):
    """The process ended without an answer."""


class WorkerPool:
    """Compiles structured outputs in processes that start when they are first needed.

    To be used on one event loop, by its main thread: the processes end with the thread that started them.
    """

    def __init__(
        self, tokenizer: Path, eos_token_ids: Sequence[int], timeout: float, max_bytes: int = _MAX_BYTES
    ) -> None:
        """Create a pool.

        Args:
            tokenizer: the checkpoint's tokenizer.json.
            eos_token_ids: ids that end a text.
            timeout: seconds that compiling one grammar may take.
            max_bytes: memory that it may take, on top of what the tokenizer does.
        """
        self._command = [sys.executable, "-m", _MODULE, str(tokenizer), str(max_bytes), *map(str, eos_token_ids)]
        self._timeout = timeout
        self._slots = asyncio.Semaphore(_MAX_WORKERS)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._waiting = 0

    async def compile(self, structured: StructuredOutput) -> Verdict:
        """Convert and compile ``structured``.

        Raises:
            RequestError: RESOURCE_EXHAUSTED: too many wait already; FAILED_PRECONDITION: the tokenizer is of a kind
                that grammars cannot be used with; UNAVAILABLE: no process can be started.
        """
        async with self._turn() as worker:
            return await self._compile(worker, structured)

    async def are_over(self, grammar: Grammar, outputs: Sequence[Sequence[int]]) -> list[bool]:
        """Of each of ``outputs``, token ids, whether nothing can follow it; False too where that cannot be found out
        within the limits, which are those of all together.

        Raises:
            RequestError: as ``compile``.
        """
        over = [False] * len(outputs)
        is_idle = False
        async with self._turn() as worker:
            try:
                async with asyncio.timeout(self._timeout):
                    for index, token_ids in enumerate(outputs):
                        answer = await worker.ask({"grammar": grammar.text, "token_ids": list(token_ids)})
                        over[index] = bool(answer["is_over"])
                is_idle = True
                self._idle.append(worker)
            except (TimeoutError, _WorkerDiedError):
                pass
            finally:
                if not is_idle:  # also when the caller has gone: the answer would be taken for the next job's
                    await self._discard(worker)
        return over

    async def close(self) -> None:
        """Kill the processes and wait for their end."""
        self._idle.clear()
        await asyncio.gather(*(self._discard(worker) for worker in [*self._all]))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator["_Worker"]:
        """A worker of one's own, which has to be put back or discarded."""
        if self._waiting >= _MAX_WAITING:
            raise overloaded("too many grammars wait to be compiled")
        self._waiting += 1
        try:
            async with self._slots:
                yield self._idle.pop() if self._idle else await self._start()
        finally:
            self._waiting -= 1

    async def _compile(self, worker: "_Worker", structured: StructuredOutput) -> Verdict:
        job = {"kind": structured.kind.value, "texts": structured.texts}
        try:
            answer = await asyncio.wait_for(worker.ask(job), self._timeout)
        except TimeoutError:
            verdict: Verdict = Refusal(f"takes longer than {self._timeout:g} s to compile; make it simpler", False)
        except _WorkerDiedError:
            verdict = Refusal("takes too much memory to compile; make it simpler", False)
        else:
            self._idle.append(worker)
            return Refusal(f"cannot be used: {answer['error']}") if "error" in answer else Grammar(answer["grammar"])
        await self._discard(worker)
        return verdict

    async def _start(self) -> "_Worker":
        worker = None
        try:
            worker = _Worker(
                await asyncio.create_subprocess_exec(
                    *self._command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=_MAX_LINE_BYTES
                )
            )
            self._all.add(worker)
            greeting = await asyncio.wait_for(worker.answer(), _START_SECONDS)
        except (OSError, TimeoutError, _WorkerDiedError) as error:
            if worker is not None:
                await self._discard(worker)
            _log.error("a process that compiles grammars did not start: %r", error)
            raise unavailable("grammars cannot be compiled now") from error
        if "error" in greeting:
            await self._discard(worker)
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "sampling.structured",
                f"the served model's tokenizer does not go with grammars: {greeting['error']}",
            )
        return worker

    async def _discard(self, worker: "_Worker") -> None:
        self._all.discard(worker)
        await worker.kill()


class _Worker:
    """One process and its pipes."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    async def ask(self, job: Mapping[str, object]) -> dict[str, str]:
        """Send a job and wait for its answer; raises _WorkerDiedError."""
        try:
            self._stdin.write(json.dumps(job).encode() + b"\n")
            await self._stdin.drain()
        except ConnectionError as error:
            raise _WorkerDiedError from error
        return await self.answer()

    async def answer(self) -> dict[str, str]:
        """Wait for the next line; raises _WorkerDiedError."""
        line = await self._stdout.readline()
        if not line.endswith(b"\n"):
            raise _WorkerDiedError
        answer: dict[str, str] = json.loads(line)
        return answer

    async def kill(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
