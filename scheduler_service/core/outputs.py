"""What scheduling tells those who asked: tokens, log probabilities, ends."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core import logprobs as columns
from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.request import FinishReason, Request, RequestStatus
from scheduler_service.core.step_plan import Int32s

_NO_INDICES = np.zeros(0, np.intp)
_NO_HANDLES = np.zeros(0, np.int64)
_NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request's end, reported once.

    Attributes:
        num_cached_tokens: of its prompt, from the prefix cache.
        message: for the caller, where it failed.
        queue_us: from receipt to the first step planned for it; 0 = never started.
        stop_token_id: its last token, where the reason is STOP.
        executor_losses: executors that were lost while they ran it.
    """

    handle: int
    reason: FinishReason
    num_cached_tokens: int = 0
    message: str = ""
    queue_us: int = 0
    stop_token_id: int = 0
    executor_losses: int = 0


def finish(request: Request, reason: FinishReason, message: str = "", stop_token_id: int = 0) -> FinishedRequest:
    """End a request, which has neither row nor place in a queue any more; its end as it is reported."""
    request.status = RequestStatus.FINISHED
    return FinishedRequest(
        handle=request.handle,
        reason=reason,
        num_cached_tokens=request.num_cached_tokens or 0,
        message=message,
        queue_us=request.queue_us,
        stop_token_id=stop_token_id if reason is FinishReason.STOP else 0,
        executor_losses=request.executor_losses,
    )


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of a request's prompt tokens at the positions from ``start_position`` on."""

    handle: int
    start_position: int
    logprobs: LogprobColumns


@dataclass(frozen=True, slots=True)
class Outputs:
    """What became known. A request's prompt log probabilities come before its first token, its end after its last.

    Attributes:
        handles, token_ids: ``token_ids[i]`` is the next token of ``handles[i]`` (int64).
        finished: who finished with it.
        logprob_indices: indices of the tokens that have log probabilities, ascending.
        logprobs: one entry for each of them; None when there is none.
        prompt_logprobs: each position once.
        best_effort_handles: whose tokens come, from these on, from an executor that may round otherwise.
    """

    handles: NDArray[np.int64]
    token_ids: Int32s
    finished: list[FinishedRequest]
    logprob_indices: NDArray[np.intp] = field(default_factory=lambda: _NO_INDICES)
    logprobs: LogprobColumns | None = None
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    best_effort_handles: list[int] = field(default_factory=list)

    def part(self, is_mine: Callable[[NDArray[np.int64]], NDArray[np.bool_]]) -> "Outputs":
        """What concerns the handles (int64 array) that ``is_mine`` says True of."""

        def chosen(handles: list[int]) -> list[bool]:
            return is_mine(np.array(handles, np.int64)).tolist() if handles else []

        mine = is_mine(self.handles)
        indices, logprobs = _NO_INDICES, None
        if self.logprobs is not None:
            entries = np.flatnonzero(mine[self.logprob_indices])
            indices = (np.cumsum(mine) - 1)[self.logprob_indices[entries]]
            logprobs = self.logprobs.take(entries) if len(entries) else None
        return Outputs(
            handles=self.handles[mine],
            token_ids=self.token_ids[mine],
            finished=list(compress(self.finished, chosen([end.handle for end in self.finished]))),
            logprob_indices=indices,
            logprobs=logprobs,
            prompt_logprobs=list(compress(self.prompt_logprobs, chosen([p.handle for p in self.prompt_logprobs]))),
            best_effort_handles=list(compress(self.best_effort_handles, chosen(self.best_effort_handles))),
        )


def ends(finished: list[FinishedRequest]) -> Outputs:
    """Outputs without tokens."""
    return Outputs(_NO_HANDLES, _NO_TOKENS, finished)


def merge(outputs: list[Outputs]) -> Outputs:
    """Several outputs as one, in order; ``outputs`` is not empty."""
    if len(outputs) == 1:
        return outputs[0]
    logprobs = [part.logprobs for part in outputs if part.logprobs is not None]
    offsets = np.cumsum([0] + [len(part.handles) for part in outputs[:-1]]).tolist()
    indices = [part.logprob_indices + offset for part, offset in zip(outputs, offsets, strict=True)]
    return Outputs(
        handles=np.concatenate([part.handles for part in outputs]),
        token_ids=np.concatenate([part.token_ids for part in outputs]),
        finished=[end for part in outputs for end in part.finished],
        logprob_indices=np.concatenate(indices) if logprobs else _NO_INDICES,
        logprobs=columns.concatenate(logprobs) if logprobs else None,
        prompt_logprobs=[item for part in outputs for item in part.prompt_logprobs],
        best_effort_handles=[handle for part in outputs for handle in part.best_effort_handles],
    )
