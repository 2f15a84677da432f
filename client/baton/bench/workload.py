"""What is asked of the cluster: prompts and output lengths, a function of a seed and nothing else."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from baton.bench.lengths import Lengths
from baton.bench.trace import BLOCK_TOKENS, TraceRequest
from baton.errors import InvalidRequestError

# Roots of independent random streams.
_CONTENT, _PREFIX, _BLOCKS = range(3)


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: a text or token ids, and how many tokens to generate, whatever they are."""

    prompt: str | list[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What prompts are made of, and how many tokens prompt and output may have together."""

    size: int
    max_total_tokens: int

    def ids(self, random: np.random.Generator, count: int) -> list[int]:
        """Random token ids."""
        drawn: list[int] = random.integers(self.size, size=count).tolist()
        return drawn

    def fit(self, prompt_tokens: int, output_tokens: int) -> tuple[int, int]:
        """Both counts, cut to what one request may have: the output loses no more than it must."""
        output_tokens = min(output_tokens, self.max_total_tokens - 1)
        return min(prompt_tokens, self.max_total_tokens - output_tokens), output_tokens


class Workload(Protocol):
    """Where requests come from."""

    @property
    def offsets(self) -> Sequence[float] | None:
        """When its requests arrive, in seconds; None when it does not say."""

    def requests(self, run: int) -> Iterator[BenchRequest]:
        """The requests of a run. Runs differ in content, so that a prefix cache kept from one cannot answer another."""


class SyntheticWorkload:
    """Endless random prompts.

    Args:
        vocabulary: of the served model.
        prompt: lengths of the prompts.
        output: lengths of the outputs.
        prefix_tokens: so many tokens, the same in all runs, stand before every prompt.
        seed: same seed, same requests.
    """

    offsets = None

    def __init__(self, vocabulary: Vocabulary, prompt: Lengths, output: Lengths, prefix_tokens: int, seed: int) -> None:
        if prefix_tokens >= vocabulary.max_total_tokens - 1:
            raise InvalidRequestError(
                f"a shared prefix of {prefix_tokens} tokens leaves no room in {vocabulary.max_total_tokens}"
            )
        self._vocabulary = vocabulary
        self._prompt = prompt
        self._output = output
        self._prefix = vocabulary.ids(np.random.default_rng([seed, _PREFIX]), prefix_tokens)
        self._seed = seed

    def requests(self, run: int) -> Iterator[BenchRequest]:
        """See ``Workload``."""
        random = np.random.default_rng([self._seed, _CONTENT, run])
        while True:
            wanted = len(self._prefix) + self._prompt.draw(random)
            prompt_tokens, output_tokens = self._vocabulary.fit(wanted, self._output.draw(random))
            prefix = self._prefix[:prompt_tokens]
            own = self._vocabulary.ids(random, prompt_tokens - len(prefix))
            yield BenchRequest(prefix + own, output_tokens)


class TraceWorkload:
    """The requests of a trace, once.

    Args:
        vocabulary: of the served model.
        trace: the requests, by time; at least one.
        seed: same seed, same made-up prompts.
    """

    def __init__(self, vocabulary: Vocabulary, trace: Sequence[TraceRequest], seed: int) -> None:
        self._vocabulary = vocabulary
        self._trace = trace
        self._seed = seed

    @property
    def offsets(self) -> Sequence[float] | None:
        """See ``Workload``; the first request's is 0."""
        first = self._trace[0].offset
        return None if first is None else [(request.offset or 0.0) - first for request in self._trace]

    def requests(self, run: int) -> Iterator[BenchRequest]:
        """See ``Workload``."""
        random = np.random.default_rng([self._seed, _CONTENT, run])
        for request in self._trace:
            if request.prompt:
                yield BenchRequest(request.prompt, min(request.output_tokens, self._vocabulary.max_total_tokens - 1))
                continue
            prompt_tokens, output_tokens = self._vocabulary.fit(request.input_tokens, request.output_tokens)
            blocks = (self._block(run, one) for one in request.block_ids)
            named = list(itertools.islice(itertools.chain.from_iterable(blocks), prompt_tokens))
            yield BenchRequest(named + self._vocabulary.ids(random, prompt_tokens - len(named)), output_tokens)

    def _block(self, run: int, name: int) -> list[int]:
        return self._vocabulary.ids(np.random.default_rng([self._seed, _BLOCKS, run, name]), BLOCK_TOKENS)
