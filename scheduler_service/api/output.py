"""What a request gives back, as plain values, whatever dialect asks for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why a sample ended."""

    STOP = "stop"  # an end-of-sequence or stop id, a stop string, or the end of what a structured output allows
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's log probabilities.

    Attributes:
        rank: 1 = the most likely.
        top_token_ids: the most likely tokens, best first.
        text, top_texts: of the token and of the top ones; empty where no text is wanted.
    """

    token_id: int
    logprob: float
    rank: int
    top_token_ids: Sequence[int]
    top_logprobs: Sequence[float]
    text: str = ""
    top_texts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Microseconds since the request's receipt.

    Attributes:
        queue_us: to the first step planned for the sample; 0 = there was none.
        first_token_us: 0 = no token came.
        batch_us, batch_tokens: when tokens came, and how many there were by then.
    """

    queue_us: int
    first_token_us: int
    total_us: int
    batch_us: list[int]
    batch_tokens: list[int]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; ``cached_tokens`` are the prompt tokens that came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sample ended.

    Attributes:
        usage: of this sample alone.
        stop_string, stop_token_id: what ended it, for STOP; both None where a structured output was complete.
        cumulative_logprob: sum over the tokens that were generated here; 0 without log probabilities.
        timings: None unless asked for.
        executor_losses: executors that were lost while they ran it.
    """

    reason: FinishReason
    usage: Usage
    stop_string: str | None = None
    stop_token_id: int | None = None
    cumulative_logprob: float = 0.0
    timings: Timings | None = None
    executor_losses: int = 0


@dataclass(slots=True)  # frozen ones take three times as long to make, and there is one for every message
class Delta:
    """News of one sample.

    Attributes:
        sample: which one.
        chunk_index: counts the sample's deltas that have tokens or text, from 0.
        token_index: absolute index of ``token_ids[0]`` in the sample's output.
        text: what became certain; it need not align with ``token_ids``.
        text_offset: offset of ``text`` in the sample's text, in code points.
        logprobs: one per token id where asked for, else empty.
        prompt_logprobs: one per prompt token but the first, in one delta of sample 0 where asked for; else None.
        best_effort: the tokens since the last delta come from an executor that may round otherwise.
        ending: None while the sample goes on.
    """

    sample: int
    chunk_index: int
    token_index: int
    token_ids: list[int]
    text: str
    text_offset: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    best_effort: bool = False
    ending: Ending | None = None

    @property
    def has_content(self) -> bool:
        """Whether there are tokens or text."""
        return bool(self.token_ids or self.text)


def total_usage(endings: Sequence[Ending]) -> Usage:
    """Of all samples of a request together; the prompt counts once."""
    usages = [ending.usage for ending in endings]
    return Usage(
        prompt_tokens=usages[0].prompt_tokens,
        # The other samples find in the cache what the first has just put there.
        cached_tokens=min(usage.cached_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
    )
