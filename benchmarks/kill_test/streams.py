"""Streams as a caller sees them: what came, and when."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton import AsyncClient, BatonError, Completion, GenerateOptions, InvalidRequestError
from benchmarks.kill_test.cases import Case


@dataclass(frozen=True, slots=True)
class Output:
    """What must be the same whatever happens. Cached tokens and timings may differ, and are not in it."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[str, ...]
    stops: tuple[object, ...]
    logprobs: tuple[object, ...]
    prompt_logprobs: tuple[object, ...]
    usage: tuple[int, int]

    @classmethod
    def of(cls, completion: Completion) -> "Output":
        samples = completion.samples
        return cls(
            texts=tuple(one.text for one in samples),
            token_ids=tuple(one.token_ids for one in samples),
            finish_reasons=tuple(str(one.finish_reason) for one in samples),
            stops=tuple((one.stop_string, one.stop_token_id) for one in samples),
            logprobs=tuple(one.logprobs for one in samples),
            prompt_logprobs=completion.prompt_logprobs,
            usage=(completion.usage.prompt_tokens, completion.usage.completion_tokens),
        )


@dataclass(slots=True, eq=False)
class Stream:
    """One stream: ``times`` says when deltas came, in seconds of the monotonic clock; the end counts as one."""

    case: int
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    output: Output | None = None
    error: str = ""
    interruptions: int = 0
    is_exact: bool = True


class Load:
    """A number of streams, so many at a time.

    Attributes:
        done: those that have ended.
        live: those that run.
    """

    def __init__(self, cases: Sequence[Case], count: int, concurrency: int) -> None:
        self.done: list[Stream] = []
        self.live: set[Stream] = set()
        self._cases = cases
        self._count = count
        self._turns = iter(range(count))
        self._concurrency = concurrency

    @property
    def is_over(self) -> bool:
        """Whether all streams have ended."""
        return len(self.done) == self._count

    @property
    def full_until(self) -> int:
        """How many have ended when no more of them wait for their turn."""
        return max(0, self._count - self._concurrency)

    async def run(self, clients: Sequence[AsyncClient]) -> None:
        """Run them all."""
        async with asyncio.TaskGroup() as group:
            for client in itertools.islice(itertools.cycle(clients), self._concurrency):
                group.create_task(self._work(client))

    async def _work(self, client: AsyncClient) -> None:
        for turn in self._turns:
            index = turn % len(self._cases)
            stream = Stream(index)
            self.live.add(stream)
            await _follow(client, self._cases[index], stream)
            self.live.discard(stream)
            self.done.append(stream)


async def _follow(client: AsyncClient, case: Case, stream: Stream) -> None:
    try:
        async with client.stream(case.prompt, **case.options) as reading:
            try:
                async for delta in reading:
                    stream.times.append(time.monotonic())
                    stream.tokens += len(delta.token_ids)
                stream.times.append(time.monotonic())
                stream.output, stream.is_exact = Output.of(reading.completion), reading.completion.exact
            finally:
                stream.interruptions = reading.interruptions
    except BatonError as error:
        stream.error = f"{type(error).__name__}: {error.message}"


async def accepted(client: AsyncClient, cases: Sequence[Case]) -> tuple[list[Case], dict[str, str]]:
    """The cases that the cluster takes, and why not the others, by name."""
    refused: dict[str, str] = {}
    for case in {case.name: case for case in cases}.values():
        try:
            short: GenerateOptions = {**case.options, "max_tokens": 1, "min_tokens": 0}
            await client.generate(case.prompt, **short)
        except InvalidRequestError as error:
            refused[case.name] = error.message
    return [case for case in cases if case.name not in refused], refused
