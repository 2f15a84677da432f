"""engine.proto <-> plain values."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from baton_protos import engine_pb2, execution_pb2, generation_pb2
from baton_protos.columns import FLOAT32, INT64, pack, unpack
from scheduler_service.api.messages import (
    EngineLimits,
    Finish,
    ForwardAbort,
    Outcome,
    Outputs,
    PromptLogprobs,
    RowSampling,
    Submission,
    TokenLogprob,
)

_OUTCOMES = {
    engine_pb2.OUTCOME_STOP: Outcome.STOP,
    engine_pb2.OUTCOME_LENGTH: Outcome.LENGTH,
    engine_pb2.OUTCOME_ABORT: Outcome.ABORT,
    engine_pb2.OUTCOME_REJECTED: Outcome.REJECTED,
    engine_pb2.OUTCOME_UNAVAILABLE: Outcome.UNAVAILABLE,
    engine_pb2.OUTCOME_ERROR: Outcome.ERROR,
    engine_pb2.OUTCOME_OVERLOADED: Outcome.OVERLOADED,
}


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The engine's answer to a status query. ``response`` goes to the caller untouched, hence the generated type."""

    query_id: int
    response: generation_pb2.GetClusterStatusResponse


class ExecutorAction(Enum):
    """What an operator may ask of an executor."""

    PAUSE = engine_pb2.EXECUTOR_ACTION_PAUSE
    RESUME = engine_pb2.EXECUTOR_ACTION_RESUME
    DRAIN = engine_pb2.EXECUTOR_ACTION_DRAIN


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The engine's answer to an operator's order; ``known``: there is such an executor."""

    query_id: int
    known: bool


FromEngine = EngineLimits | Outputs | ClusterStatus | CommandResult | ForwardAbort


def encode_attach() -> bytes:
    """The first frame of an api process."""
    return engine_pb2.ToEngine(attach=engine_pb2.Attach()).SerializeToString()


def encode_submit(submission: Submission) -> bytes:
    """The frame that hands a request to the engine."""
    submit = engine_pb2.Submit(
        handle=submission.handle,
        prompt_token_ids=pack(submission.prompt_token_ids),
        max_tokens=submission.max_tokens,
        sampling=_encode_sampling(submission.sampling),
        output_token_ids=_encode_ids(submission.output_token_ids),
        cache_salt=submission.cache_salt,
        priority=submission.priority,
        queue_timeout_ms=submission.queue_timeout_ms,
    )
    return engine_pb2.ToEngine(submit=submit).SerializeToString()


def _encode_sampling(sampling: RowSampling) -> execution_pb2.RowSampling:
    return execution_pb2.RowSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        seed=sampling.seed,
        bias_token_ids=_encode_ids([token_id for token_id, _ in sampling.logit_bias]),
        bias_values=pack(np.array([value for _, value in sampling.logit_bias], FLOAT32), FLOAT32),
        allowed_token_ids=_encode_ids(sampling.allowed_token_ids),
        banned_token_ids=_encode_ids(sampling.banned_token_ids),
        min_tokens=sampling.min_tokens,
        stop_token_ids=_encode_ids(sampling.stop_token_ids),
        grammar=sampling.grammar,
        num_logprobs=sampling.num_logprobs,
        processed_logprobs=sampling.processed_logprobs,
        num_prompt_logprobs=sampling.num_prompt_logprobs,
    )


def _encode_ids(token_ids: Sequence[int]) -> bytes:
    return pack(list(token_ids)) if token_ids else b""


def encode_hold(held: list[int], released: list[int]) -> bytes:
    """The frame that says whose readers do not keep up, and whose do again."""
    hold = engine_pb2.Hold(held=pack(held, INT64), released=pack(released, INT64))
    return engine_pb2.ToEngine(hold=hold).SerializeToString()


def encode_abort(handles: list[int]) -> bytes:
    """The frame that ends requests of this process."""
    return engine_pb2.ToEngine(abort=engine_pb2.Abort(handles=pack(handles, INT64))).SerializeToString()


def encode_forward_abort(request_ids: list[str], taken_over_at: float | None = None) -> bytes:
    """The frame that asks the other api processes to abort."""
    forwarded = engine_pb2.ForwardAbort(request_ids=request_ids, taken_over_at_ns=round((taken_over_at or 0.0) * 1e9))
    return engine_pb2.ToEngine(forward_abort=forwarded).SerializeToString()


def encode_command(query_id: int, executor_id: str, action: ExecutorAction) -> bytes:
    """The frame that passes an operator's order on."""
    command = engine_pb2.ExecutorCommand(query_id=query_id, executor_id=executor_id, action=action.value)
    return engine_pb2.ToEngine(executor_command=command).SerializeToString()


def encode_status_query(query_id: int) -> bytes:
    """The frame that asks for the cluster's status."""
    return engine_pb2.ToEngine(status=engine_pb2.StatusQuery(query_id=query_id)).SerializeToString()


def decode(frame: bytes) -> FromEngine:
    """What the engine said.

    Raises:
        ValueError: the frame is malformed (protobuf's DecodeError is one).
    """
    message = engine_pb2.FromEngine.FromString(frame)
    match message.WhichOneof("body"):
        case "outputs":
            return _outputs(message.outputs)
        case "limits":
            return _limits(message.limits)
        case "status":
            response = generation_pb2.GetClusterStatusResponse(
                queued_requests=message.status.queued_requests,
                executors=message.status.executors,
                oldest_queued_us=message.status.oldest_queued_us,
            )
            return ClusterStatus(message.status.query_id, response)
        case "executor_command":
            return CommandResult(message.executor_command.query_id, message.executor_command.known)
        case "forward_abort":
            forwarded = message.forward_abort
            return ForwardAbort(tuple(forwarded.request_ids), forwarded.taken_over_at_ns / 1e9 or None)
        case body:
            raise ValueError(f"unknown frame from the engine: {body}")


def _outputs(batch: engine_pb2.OutputBatch) -> Outputs:
    handles = unpack(batch.handles, INT64).tolist()
    token_ids = unpack(batch.token_ids).tolist()
    if len(handles) != len(token_ids):
        raise ValueError("an output batch's columns differ in length")
    logprobs: dict[int, TokenLogprob] = {}
    if batch.logprob_indices:
        logprobs = dict(zip(unpack(batch.logprob_indices).tolist(), _logprobs(batch.logprobs), strict=True))
    prompt_logprobs = [
        PromptLogprobs(item.handle, item.start_position, _logprobs(item.logprobs)) for item in batch.prompt_logprobs
    ]
    finished = [(item.handle, _finish(item)) for item in batch.finished]
    best_effort_handles = unpack(batch.best_effort_handles, INT64).tolist()
    return Outputs(handles, token_ids, finished, logprobs, prompt_logprobs, best_effort_handles)


def _finish(item: engine_pb2.FinishedRequest) -> Finish:
    return Finish(
        outcome=_OUTCOMES.get(item.outcome, Outcome.ERROR),
        cached_tokens=item.cached_tokens,
        message=item.message,
        queue_us=item.queue_us,
        stop_token_id=item.stop_token_id,
        executor_losses=item.executor_losses,
    )


def _logprobs(columns: execution_pb2.LogprobColumns) -> list[TokenLogprob]:
    """One value per token; columns that contradict each other are a ValueError."""
    top_token_ids = unpack(columns.top_token_ids).tolist()
    top_logprobs = unpack(columns.top_logprobs, FLOAT32).tolist()
    tokens = []
    begin = 0
    for logprob, rank, count in zip(
        unpack(columns.logprobs, FLOAT32).tolist(),
        unpack(columns.ranks).tolist(),
        unpack(columns.top_counts).tolist(),
        strict=True,
    ):
        end = begin + count
        tokens.append(TokenLogprob(logprob, rank, top_token_ids[begin:end], top_logprobs[begin:end]))
        begin = end
    if not begin == len(top_token_ids) == len(top_logprobs):
        raise ValueError("columns of log probabilities differ in length")
    return tokens


def _limits(limits: engine_pb2.Limits) -> EngineLimits:
    return EngineLimits(
        ready_executors=limits.ready_executors,
        max_total_tokens=limits.max_total_tokens,
        vocab_size=limits.vocab_size,
        model_fingerprint=limits.model_fingerprint,
        dtype=limits.dtype,
        scheduler_id=limits.scheduler_id,
        max_rows=limits.max_rows,
    )
