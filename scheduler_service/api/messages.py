"""What api processes and the engine tell each other, as plain values."""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class Outcome(Enum):
    """How a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"  # never said by the engine: api processes watch deadlines, and abort
    REJECTED = "rejected"
    UNAVAILABLE = "unavailable"
    ERROR = "error"
    OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the executors can take, all of them together; zeros until the engine has spoken.

    Attributes:
        ready_executors: executors that take plans.
        max_total_tokens: largest prompt + output of one request; 0 = no executor has joined yet.
        max_rows: samples that can run at a time.
    """

    ready_executors: int = 0
    max_total_tokens: int = 0
    vocab_size: int = 0
    model_fingerprint: str = ""
    dtype: str = ""
    scheduler_id: str = ""
    max_rows: int = 0


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How a row samples; names and meanings are those of execution.proto. The defaults sample from the plain model.

    Attributes:
        logit_bias: (token id, value) pairs.
        min_tokens: stop ids are not sampled, and do not end the request, before its output has this many tokens.
        stop_token_ids: end the request; the checkpoint's end-of-sequence ids included.
        num_logprobs, num_prompt_logprobs: None = no log probabilities, 0 = of the token alone.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    grammar: str = ""
    num_logprobs: int | None = None
    processed_logprobs: bool = False
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """A validated request on its way to the engine.

    Attributes:
        handle: drawn by this process and unique within it.
        max_tokens: most output tokens, ``output_token_ids`` included.
        output_token_ids: output that the caller already has; the engine's first token is the one after it.
        cache_salt: start of the prefix cache's hash chain: empty for the default tenant, else 32 bytes.
        priority: lower runs first.
        queue_timeout_ms: fail UNAVAILABLE when not started within this time; 0 = the engine's own limit.
    """

    handle: int
    prompt_token_ids: NDArray[np.int32]
    max_tokens: int
    sampling: RowSampling
    output_token_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""
    priority: int = 0
    queue_timeout_ms: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a request.

    Attributes:
        cached_tokens: prompt tokens that came from the prefix cache.
        message: explains the outcomes that are errors.
        queue_us: from receipt to the first step planned for it; 0 = never started.
        stop_token_id: the last token, for STOP. It need not be a stop id: a grammar ends a request too.
        executor_losses: executors that were lost while they ran it.
    """

    outcome: Outcome
    cached_tokens: int = 0
    message: str = ""
    queue_us: int = 0
    stop_token_id: int = 0
    executor_losses: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log probability, its rank (1 = the most likely), and the most likely tokens, best first."""

    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of prompt tokens at the positions from ``start_position`` on. Each position comes once."""

    handle: int
    start_position: int
    logprobs: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Outputs:
    """One step's news for this process; a request's prompt log probabilities come before its first token.

    Attributes:
        handles, token_ids: ``token_ids[i]`` is the next token of ``handles[i]``.
        finished: requests that ended, after their last token.
        logprobs: by index into ``token_ids``, of the tokens that have log probabilities.
        prompt_logprobs: what became known of prompts.
        best_effort_handles: whose tokens come, from these on, from an executor that may round otherwise.
    """

    handles: list[int]
    token_ids: list[int]
    finished: list[tuple[int, Finish]] = field(default_factory=list)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    best_effort_handles: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ForwardAbort:
    """Caller-visible request ids to abort wherever they live.

    Attributes:
        taken_over_at: when the call arrived that has taken them over, in seconds of the machine's monotonic clock: only
            what earlier calls began is aborted. None = their caller wants them to end.
    """

    request_ids: tuple[str, ...]
    taken_over_at: float | None = None
