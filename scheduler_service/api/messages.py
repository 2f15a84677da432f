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
    """

    ready_executors: int = 0
    max_total_tokens: int = 0
    vocab_size: int = 0
    model_fingerprint: str = ""
    dtype: str = ""
    scheduler_id: str = ""


@dataclass(frozen=True, slots=True)
class Submission:
    """A validated request on its way to the engine."""

    handle: int
    prompt_token_ids: NDArray[np.int32]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a request; ``message`` explains the outcomes that are errors."""

    outcome: Outcome
    cached_tokens: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Outputs:
    """One step's tokens for this process: ``token_ids[i]`` belongs to ``handles[i]``; then requests that ended."""

    handles: list[int]
    token_ids: list[int]
    finished: list[tuple[int, Finish]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ForwardAbort:
    """Caller-visible request ids to abort wherever they live."""

    request_ids: tuple[str, ...]
