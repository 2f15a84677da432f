"""The workloads of every serving benchmark, as plain lists of token ids.

Lengths are fixed. Contents are fresh in every run, so that a prefix cache kept from one run cannot answer the next.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

_FIRST_ID, _LAST_ID = 3, 4095  # in every shape's vocabulary, and no special ids


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how many tokens to generate whatever they are."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are sent at the same time; ``first_alone``: the first one ends before the others are sent."""

    name: str
    title: str
    make: Callable[[int], list[Request]]
    first_alone: bool = False

    def bursts(self, run: int) -> list[list[Request]]:
        """What is sent together, burst after burst, in this run."""
        requests = self.make(run)
        return [requests[:1], requests[1:]] if self.first_alone else [requests]


def mixed(run: int, count: int) -> list[Request]:
    """Prompts of 32 to 256 tokens, outputs of 32 to 128."""
    lengths = random.Random(1)
    sizes = [(lengths.randint(32, 256), lengths.randint(32, 128)) for _ in range(count)]
    contents = random.Random(1000 + run)
    return [Request(_ids(contents, prompt), output) for prompt, output in sizes]


def _single(run: int, prompt: int, output: int) -> list[Request]:
    return [Request(_ids(random.Random(2000 + run + 1000 * prompt), prompt), output)]


def _shared_prefix(run: int) -> list[Request]:
    contents = random.Random(4000 + run)
    prefix = _ids(contents, 512)
    return [Request(prefix + _ids(contents, 32), 16) for _ in range(32)]


def _ids(contents: random.Random, count: int) -> list[int]:
    return [contents.randint(_FIRST_ID, _LAST_ID) for _ in range(count)]


WORKLOADS: Final[Mapping[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload("W1", "64 requests at once: 8959 prompt tokens, 5385 out", lambda run: mixed(run, 64)),
        Workload("W1-16", "the first 16 of W1: 2194 prompt tokens, 1158 out", lambda run: mixed(run, 16)),
        Workload("W2", "decode alone: 32 in, 128 out", lambda run: _single(run, 32, 128)),
        Workload("W3", "prefill alone: 1024 in, 1 out", lambda run: _single(run, 1024, 1)),
        Workload("W4", "32 requests at once, 512 shared and 32 own tokens in, 16 out", _shared_prefix),
        Workload(
            "W4w", "W4, the first request ends before the others come", lambda run: _shared_prefix(run + 500), True
        ),
    )
}
"""By name."""

# Not measured, not listed: what a side runs first, so that kernels, caches and threads are set up.
WARM_UP: Final = Workload("warm-up", "", lambda run: [Request(one.prompt, 8) for one in mixed(run + 9000, 16)])
