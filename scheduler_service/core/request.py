"""Requests: the token log and the parameters from which everything about a request can be rebuilt."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # which builds on the ledger, and that on requests
    from scheduler_service.core.suspicion import DeathRecord

DEFAULT_SALT = bytes(32)

_MAX_AUDITED_TOKENS = 64
_NOTHING = np.zeros(0, np.int32)


class RequestStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


class FinishReason(Enum):
    STOP = auto()  # sampled an end-of-sequence or stop id, or completed its grammar
    LENGTH = auto()
    ABORT = auto()
    REJECTED = auto()  # can never run
    OVERLOADED = auto()  # the queue is full
    UNAVAILABLE = auto()  # waited too long
    ERROR = auto()  # failed on its executor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a row samples: the executor's business, but for what decides about scheduling and ends.

    Attributes:
        encoded: all of it as the executor reads it; handed on untouched.
        seed: of the row's noise.
        stop_token_ids: end the request once its output has had ``min_tokens`` tokens before them.
        num_logprobs: each sampled token comes with log probabilities; None = without.
        num_prompt_logprobs: the prompt's tokens do; None = they do not.
        needs_log: the executor needs the row's whole token log.
    """

    encoded: bytes = b""
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    needs_log: bool = False


class Request:
    """One request. While it runs, its row in the RowTable holds the token log and the cursors.

    Attributes:
        handle: int64, unique among live requests; results are reported under it.
        arrival: total order of arrival, kept across preemption and loss of the executor.
        priority: lower runs first.
        token_ids: int32 prompt and output so far; stale while the request runs. Never changed in place.
        num_given_tokens: prompt and the output that it came with: what was not sampled in this cluster.
        max_total_tokens: prompt and output together never grow longer.
        min_total_tokens: a stop id ends the request only after this many tokens.
        salt: 32 bytes, where the hash chain of its blocks starts.
        block_hashes: digests of the full blocks of ``token_ids`` hashed so far, in blocks of ``hash_block_size``.
        num_cached_tokens: prompt tokens that the first admission took from the prefix cache; None before it.
        next_prompt_logprob: the first position of the prompt whose log probabilities have not been delivered.
        last_step: the last step that was dispatched for the request in its latest admission.
        is_held: its reader does not keep up; it is not scheduled.
        received_at, started_at: seconds; when it came, and when its first step was planned (None before that).
        starts_by: seconds; it fails if it has not started then. None = no such limit of its own.
        executor_losses: executors that were lost while they ran it.
        arithmetic: of the executor that computed its last output; see ExecutorCapacity.
        deaths: what speaks against it; None = no executor died with it.
    """

    __slots__ = (
        "arithmetic",
        "arrival",
        "block_hashes",
        "deaths",
        "executor_losses",
        "handle",
        "hash_block_size",
        "is_held",
        "last_step",
        "max_total_tokens",
        "min_total_tokens",
        "next_prompt_logprob",
        "num_cached_tokens",
        "num_given_tokens",
        "num_prompt_tokens",
        "priority",
        "received_at",
        "row",
        "salt",
        "sampling",
        "started_at",
        "starts_by",
        "status",
        "token_ids",
    )

    def __init__(
        self,
        handle: int,
        arrival: int,
        prompt_token_ids: NDArray[np.int32],
        max_tokens: int,
        sampling: SamplingParams,
        *,
        output_token_ids: NDArray[np.int32] = _NOTHING,
        salt: bytes = DEFAULT_SALT,
        priority: int = 0,
        received_at: float = 0.0,
        starts_by: float | None = None,
    ) -> None:
        self.handle = handle
        self.arrival = arrival
        self.priority = priority
        self.token_ids = prompt_token_ids
        if len(output_token_ids):
            self.token_ids = np.concatenate([prompt_token_ids, output_token_ids])
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_given_tokens = len(self.token_ids)
        self.max_total_tokens = len(prompt_token_ids) + max_tokens
        self.min_total_tokens = len(prompt_token_ids) + sampling.min_tokens
        self.sampling = sampling
        self.salt = salt
        self.status = RequestStatus.WAITING
        self.row = -1
        self.block_hashes: list[bytes] = []
        self.hash_block_size = 0
        self.num_cached_tokens: int | None = None
        self.next_prompt_logprob = 1
        self.last_step = 0
        self.is_held = False
        self.received_at = received_at
        self.started_at: float | None = None
        self.starts_by = starts_by
        self.executor_losses = 0
        self.arithmetic: str | None = None
        self.deaths: DeathRecord | None = None

    @property
    def queue_us(self) -> int:
        """Microseconds from receipt to the first step planned for it; 0 = never started."""
        return 0 if self.started_at is None else max(1, round((self.started_at - self.received_at) * 1e6))

    @property
    def is_quarantined(self) -> bool:
        """Whether it must run alone."""
        return self.deaths is not None and self.deaths.is_quarantined

    @property
    def bypasses_cache(self) -> bool:
        """Whether its prompt has to be computed for its log probabilities, cached or not."""
        return self.sampling.num_prompt_logprobs is not None and self.next_prompt_logprob < self.num_prompt_tokens

    @property
    def audit_from(self) -> int:
        """First position of the log that an admission audits: the last ones sampled in this cluster. 0 = none."""
        known = len(self.token_ids)
        return max(self.num_given_tokens, known - _MAX_AUDITED_TOKENS) if known > self.num_given_tokens else 0

    def is_over(self) -> FinishReason | None:
        """How its last token ends it; None if it goes on."""
        count = len(self.token_ids)
        if count > self.min_total_tokens and int(self.token_ids[-1]) in self.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self.max_total_tokens else None

    def append(self, token_id: int) -> FinishReason | None:
        """Append a token that was in flight when the request lost its row; the reason if that ends it."""
        self.token_ids = np.append(self.token_ids, np.int32(token_id))
        return self.is_over()
