"""Frames between the engine and the api processes (engine.proto) as plain values. Generated types stop here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from baton_protos import engine_pb2 as pb
from baton_protos import execution_pb2, generation_pb2
from baton_protos.columns import FLOAT32, INT64, pack, unpack
from scheduler_service.core.cluster import ExecutorState
from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.outputs import FinishedRequest, Outputs, PromptLogprobs
from scheduler_service.core.request import FinishReason, SamplingParams

_OUTCOMES = {
    FinishReason.STOP: pb.OUTCOME_STOP,
    FinishReason.LENGTH: pb.OUTCOME_LENGTH,
    FinishReason.ABORT: pb.OUTCOME_ABORT,
    FinishReason.REJECTED: pb.OUTCOME_REJECTED,
    FinishReason.UNAVAILABLE: pb.OUTCOME_UNAVAILABLE,
    FinishReason.ERROR: pb.OUTCOME_ERROR,
    FinishReason.OVERLOADED: pb.OUTCOME_OVERLOADED,
}

EXECUTOR_STATES: Mapping[ExecutorState, int] = {
    ExecutorState.SERVING: generation_pb2.EXECUTOR_STATE_SERVING,
    ExecutorState.PAUSED: generation_pb2.EXECUTOR_STATE_PAUSED,
    ExecutorState.DRAINING: generation_pb2.EXECUTOR_STATE_DRAINING,
}


class WireError(ValueError):
    """A frame that does not decode or contradicts itself."""


@dataclass(frozen=True, slots=True)
class Attach:
    """An api process introduces itself."""


@dataclass(frozen=True, slots=True)
class Submit:
    """A validated request; ``handle`` is the api process's own, the rest is as ``Cluster.add_request`` has it."""

    handle: int
    prompt_token_ids: NDArray[np.int32]
    max_tokens: int
    sampling: SamplingParams
    output_token_ids: NDArray[np.int32]
    cache_salt: bytes
    priority: int
    queue_timeout: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Requests whose readers do not keep up, and those whose readers do again."""

    held: list[int]
    released: list[int]


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends requests; those that have already ended are ignored."""

    handles: list[int]


@dataclass(frozen=True, slots=True)
class ForwardAbort:
    """Caller-visible request ids for every other api process to abort; the frame is passed on as it is."""


@dataclass(frozen=True, slots=True)
class StatusQuery:
    """Asks for a Status with the same ``query_id``."""

    query_id: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are validated against; also the engine's sign of life."""

    ready_executors: int
    max_total_tokens: int
    vocab_size: int
    model_fingerprint: str
    dtype: str
    scheduler_id: str
    max_rows: int  # over all executors that take plans


@dataclass(frozen=True, slots=True)
class ExecutorStatus:
    """One executor's state; the names are those of generation.proto."""

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
    stale_tokens: int
    state: int
    audited_tokens: int
    audit_mismatches: int
    handovers: int
    computed_tokens: int
    sampled_tokens: int


@dataclass(frozen=True, slots=True)
class Status:
    """The cluster's state, for one query; losses and drops are counted by reason since the engine's start."""

    query_id: int
    queued_requests: int
    executors: list[ExecutorStatus]
    oldest_queued_us: int = 0
    executor_losses: dict[str, int] = field(default_factory=dict)
    dropped_frames: dict[str, int] = field(default_factory=dict)


class ExecutorAction(Enum):
    """What an operator may ask of an executor."""

    PAUSE = pb.EXECUTOR_ACTION_PAUSE
    RESUME = pb.EXECUTOR_ACTION_RESUME
    DRAIN = pb.EXECUTOR_ACTION_DRAIN


@dataclass(frozen=True, slots=True)
class ExecutorCommand:
    """An operator's order; answered under its ``query_id``."""

    query_id: int
    executor_id: str
    action: ExecutorAction


ToEngine = Attach | Submit | Abort | Hold | ForwardAbort | StatusQuery | ExecutorCommand


def decode(frame: bytes) -> ToEngine:
    """One frame from an api process.

    Raises:
        WireError: it does not decode, or nothing known is inside.
    """
    try:
        message = pb.ToEngine.FromString(frame)
        match message.WhichOneof("body"):
            case "submit":
                return _decode_submit(message.submit)
            case "abort":
                return Abort(unpack(message.abort.handles, INT64).tolist())
            case "hold":
                return Hold(unpack(message.hold.held, INT64).tolist(), unpack(message.hold.released, INT64).tolist())
            case "forward_abort":
                return ForwardAbort()
            case "attach":
                return Attach()
            case "status":
                return StatusQuery(message.status.query_id)
            case "executor_command":
                command = message.executor_command
                return ExecutorCommand(command.query_id, command.executor_id, ExecutorAction(command.action))
            case kind:
                raise WireError(f"unexpected body {kind}")
    except (DecodeError, ValueError) as error:
        raise WireError(str(error)) from error


def _decode_submit(submit: pb.Submit) -> Submit:
    if submit.sampling.min_tokens > submit.max_tokens:
        raise WireError(f"min_tokens {submit.sampling.min_tokens} exceeds max_tokens {submit.max_tokens}")
    return Submit(
        handle=submit.handle,
        prompt_token_ids=unpack(submit.prompt_token_ids),
        max_tokens=submit.max_tokens,
        sampling=decode_sampling(submit.sampling),
        output_token_ids=unpack(submit.output_token_ids),
        cache_salt=submit.cache_salt,
        priority=submit.priority,
        queue_timeout=submit.queue_timeout_ms / 1e3,
    )


def decode_sampling(sampling: execution_pb2.RowSampling) -> SamplingParams:
    """Sampling parameters as the core has them."""
    repetition = sampling.repetition_penalty not in (0, 1)  # 1 is what callers get who do not ask for one
    has_penalty = repetition or sampling.frequency_penalty or sampling.presence_penalty
    num_prompt_logprobs = sampling.num_prompt_logprobs if sampling.HasField("num_prompt_logprobs") else None
    return SamplingParams(
        encoded=sampling.SerializeToString(),
        seed=sampling.seed,
        stop_token_ids=tuple(unpack(sampling.stop_token_ids).tolist()),
        min_tokens=sampling.min_tokens,
        num_logprobs=sampling.num_logprobs if sampling.HasField("num_logprobs") else None,
        num_prompt_logprobs=num_prompt_logprobs,
        needs_log=bool(has_penalty or sampling.grammar or num_prompt_logprobs is not None),
    )


def encode_outputs(outputs: Outputs) -> bytes:
    """Tokens and ends of one step or event; handles are the api process's own."""
    batch = pb.OutputBatch(
        handles=pack(outputs.handles, INT64),
        token_ids=pack(outputs.token_ids),
        finished=[_encode_finished(end) for end in outputs.finished],
    )
    if outputs.best_effort_handles:
        batch.best_effort_handles = pack(outputs.best_effort_handles, INT64)
    if outputs.logprobs is not None:
        batch.logprob_indices = pack(outputs.logprob_indices)
        batch.logprobs.CopyFrom(_encode_logprobs(outputs.logprobs))
    if outputs.prompt_logprobs:
        batch.prompt_logprobs.extend([_encode_prompt_logprobs(item) for item in outputs.prompt_logprobs])
    return pb.FromEngine(outputs=batch).SerializeToString()


def _encode_finished(end: FinishedRequest) -> pb.FinishedRequest:
    return pb.FinishedRequest(
        handle=end.handle,
        outcome=_OUTCOMES[end.reason],
        cached_tokens=end.num_cached_tokens,
        message=end.message,
        queue_us=end.queue_us,
        stop_token_id=end.stop_token_id,
        executor_losses=end.executor_losses,
    )


def _encode_prompt_logprobs(item: PromptLogprobs) -> pb.PromptLogprobs:
    return pb.PromptLogprobs(
        handle=item.handle, start_position=item.start_position, logprobs=_encode_logprobs(item.logprobs)
    )


def _encode_logprobs(logprobs: LogprobColumns) -> execution_pb2.LogprobColumns:
    return execution_pb2.LogprobColumns(
        logprobs=pack(logprobs.logprobs, FLOAT32),
        ranks=pack(logprobs.ranks),
        top_counts=pack(logprobs.top_counts),
        top_token_ids=pack(logprobs.top_token_ids),
        top_logprobs=pack(logprobs.top_logprobs, FLOAT32),
    )


def encode_limits(limits: Limits) -> bytes:
    """The frame that every api process gets on attaching, on every change, and as a sign of life."""
    message = pb.Limits(
        ready_executors=limits.ready_executors,
        max_total_tokens=limits.max_total_tokens,
        vocab_size=limits.vocab_size,
        model_fingerprint=limits.model_fingerprint,
        dtype=limits.dtype,
        scheduler_id=limits.scheduler_id,
        max_rows=limits.max_rows,
    )
    return pb.FromEngine(limits=message).SerializeToString()


def encode_forward_abort(frame: bytes) -> bytes:
    """The frame that passes on a ForwardAbort ``frame`` of another api process."""
    return pb.FromEngine(forward_abort=pb.ToEngine.FromString(frame).forward_abort).SerializeToString()


def encode_command_result(query_id: int, known: bool) -> bytes:
    """The answer to an ExecutorCommand: whether there is such an executor."""
    result = pb.ExecutorCommandResult(query_id=query_id, known=known)
    return pb.FromEngine(executor_command=result).SerializeToString()


def encode_status(status: Status) -> bytes:
    """The answer to a StatusQuery."""
    executors = [
        generation_pb2.ExecutorStatus(**{name: getattr(executor, name) for name in ExecutorStatus.__slots__})
        for executor in status.executors
    ]
    message = pb.Status(
        query_id=status.query_id,
        queued_requests=status.queued_requests,
        executors=executors,
        oldest_queued_us=status.oldest_queued_us,
        executor_losses=_encode_counts(status.executor_losses),
        dropped_frames=_encode_counts(status.dropped_frames),
    )
    return pb.FromEngine(status=message).SerializeToString()


def _encode_counts(counts: Mapping[str, int]) -> list[pb.ReasonCount]:
    return [pb.ReasonCount(reason=reason, count=count) for reason, count in counts.items()]
