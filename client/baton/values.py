"""What the client takes and returns: plain immutable values, no protobuf types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; ``role`` is what the checkpoint's chat template knows, such as ``"user"``."""

    role: str
    content: str


# Text, token ids, or a conversation.
Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, str]]


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence or stop id, a stop string, or the end of a structured output
    LENGTH = "length"  # max_tokens, or the context's end
    ABORT = "abort"  # somebody aborted it by its id
    DEADLINE = "deadline"  # its deadline came first


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; ``cached_tokens`` are the prompt tokens that came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most likely tokens at a place; ``logprob`` is a natural logarithm."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's log probabilities, natural logarithms.

    Attributes:
        text: empty where no text was wanted.
        rank: 1 = the most likely token at its place.
        top: the most likely tokens there, best first.
    """

    token_id: int
    logprob: float
    rank: int
    text: str
    top: tuple[TopToken, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Microseconds as the scheduler saw them, all from the request's receipt.

    Attributes:
        queue_us: to the first step planned for it.
        first_token_us: to the first token.
        total_us: to the end.
        batch_us, batch_tokens: when tokens came, and how many there were by then.
    """

    queue_us: int
    first_token_us: int
    total_us: int
    batch_us: tuple[int, ...]
    batch_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """News of a stream. ``text`` is what became certain and need not align with ``token_ids``; either may be empty.

    Attributes:
        token_index: absolute index of ``token_ids[0]`` in the sample's output.
        text_offset: offset of ``text`` in the sample's text, in code points.
        sample: which of the parallel samples.
        logprobs: one per token id, where asked for.
        best_effort: the sample goes on elsewhere, and not by exact kernels: tokens may differ from here on.
    """

    text: str
    token_ids: tuple[int, ...]
    token_index: int
    text_offset: int
    sample: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    best_effort: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One of a request's parallel samples.

    Attributes:
        seed: with it alone, as the request's, the sample comes again as sample 0.
        logprobs: one per token id, where asked for.
        cumulative_logprob: their sum; None where none were asked for.
        stop_string, stop_token_id: what ended it, where that is one of them.
        timings: None unless asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    cumulative_logprob: float | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. Sending ``prompt_token_ids`` again with ``seed`` gives the same tokens on an equal
    ``model_fingerprint``.

    Attributes:
        samples: as many as were asked for; ``text``, ``token_ids`` and so on are those of the first.
        usage: of all samples together; the prompt counts once.
        prompt_logprobs: one per prompt token but the first, where asked for.
        exact: False if it went on, after a fault, where kernels may round otherwise.
    """

    samples: tuple[Sample, ...]
    usage: Usage
    prompt_token_ids: tuple[int, ...]
    seed: int
    request_id: str
    model_fingerprint: str
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    exact: bool = True

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first sample's tokens."""
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sample ended."""
        return self.samples[0].finish_reason

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the first sample, if one did."""
        return self.samples[0].stop_string

    @property
    def stop_token_id(self) -> int | None:
        """The token that ended the first sample, if one did."""
        return self.samples[0].stop_token_id

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """The first sample's log probabilities, where asked for."""
        return self.samples[0].logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        """Their sum; None where none were asked for."""
        return self.samples[0].cumulative_logprob

    @property
    def timings(self) -> Timings | None:
        """The first sample's timings, where asked for."""
        return self.samples[0].timings


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model; ``max_total_tokens`` bounds prompt and output of one request together."""

    model: str
    model_fingerprint: str
    architectures: tuple[str, ...]
    dtype: str
    vocab_size: int
    max_total_tokens: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


class ExecutorState(StrEnum):
    """What an executor is there for."""

    SERVING = "serving"
    PAUSED = "paused"  # gets no new requests
    DRAINING = "draining"  # hands its requests over and leaves


@dataclass(frozen=True, slots=True)
class ExecutorStatus:
    """One executor as the scheduler sees it. Blocks: total = free + cached + used; times in microseconds.

    Of answered steps, ``computed_tokens`` are input tokens (of prompts, of decodes, of what was computed again) and
    ``sampled_tokens`` output tokens.

    Attributes:
        stale_tokens: sampled for requests that had ended meanwhile.
        audited_tokens, audit_mismatches: sampled again when streams went on here; those that were not what had been
            sent.
        handovers: running requests that left for another executor.
    """

    executor_id: str
    epoch: int
    device: str
    running_requests: int
    waiting_requests: int
    max_rows: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    block_size: int
    run_ahead: int
    inflight_steps: int
    steps: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    starved_us: int
    device_us: int
    computed_tokens: int
    sampled_tokens: int
    stale_tokens: int
    audited_tokens: int
    audit_mismatches: int
    handovers: int
    state: ExecutorState = ExecutorState.SERVING


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster; ``queued_requests`` wait for an executor to be chosen, the longest of them ``oldest_queued_us``."""

    scheduler_id: str
    queued_requests: int
    executors: tuple[ExecutorStatus, ...]
    oldest_queued_us: int = 0
