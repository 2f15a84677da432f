"""Requests: the token log and the parameters from which everything about a request can be rebuilt."""

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

DEFAULT_SALT = bytes(32)


class RequestStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


class FinishReason(Enum):
    STOP = auto()  # sampled an end-of-sequence or stop id
    LENGTH = auto()
    ABORT = auto()
    REJECTED = auto()  # can never run
    OVERLOADED = auto()  # the queue is full
    UNAVAILABLE = auto()  # waited too long for an executor
    ERROR = auto()  # failed on its executor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a row samples. ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: float
    top_k: int
    top_p: float
    seed: int


class Request:
    """One request. While it runs, its row in the RowTable holds the token log and the cursors.

    Attributes:
        handle: int64, unique among live requests; results are reported under it.
        arrival: total order of arrival, kept across preemption and loss of the executor.
        token_ids: int32 prompt and output so far; stale while the request runs.
        max_total_tokens: prompt and output together never grow longer.
        block_hashes: digests of the full blocks of ``token_ids`` hashed so far.
        num_cached_tokens: prompt tokens that the first admission took from the prefix cache; None before it.
        last_step: the last step that was dispatched for the request in its latest admission.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "handle",
        "last_step",
        "max_total_tokens",
        "num_cached_tokens",
        "num_prompt_tokens",
        "row",
        "salt",
        "sampling",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        handle: int,
        arrival: int,
        prompt_token_ids: NDArray[np.int32],
        max_tokens: int,
        sampling: SamplingParams,
        stop_token_ids: tuple[int, ...] = (),
        salt: bytes = DEFAULT_SALT,
    ) -> None:
        self.handle = handle
        self.arrival = arrival
        self.token_ids = prompt_token_ids
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_total_tokens = len(prompt_token_ids) + max_tokens
        self.sampling = sampling
        self.stop_token_ids = stop_token_ids
        self.salt = salt
        self.status = RequestStatus.WAITING
        self.row = -1
        self.block_hashes: list[bytes] = []
        self.num_cached_tokens: int | None = None
        self.last_step = 0

    def append(self, token_id: int) -> FinishReason | None:
        """Append a token that was in flight when the request lost its row; the reason if that ends it."""
        self.token_ids = np.append(self.token_ids, np.int32(token_id))
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_total_tokens:
            return FinishReason.LENGTH
        return None
