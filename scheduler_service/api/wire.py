"""engine.proto <-> plain values."""

from dataclasses import dataclass

from baton_protos import engine_pb2, execution_pb2, generation_pb2
from baton_protos.columns import INT64, pack, unpack
from scheduler_service.api.messages import EngineLimits, Finish, ForwardAbort, Outcome, Outputs, Submission

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


FromEngine = EngineLimits | Outputs | ClusterStatus | ForwardAbort


def encode_attach() -> bytes:
    """The first frame of an api process."""
    return engine_pb2.ToEngine(attach=engine_pb2.Attach()).SerializeToString()


def encode_submit(submission: Submission) -> bytes:
    """The frame that hands a request to the engine."""
    submit = engine_pb2.Submit(
        handle=submission.handle,
        prompt_token_ids=pack(submission.prompt_token_ids),
        max_tokens=submission.max_tokens,
        sampling=execution_pb2.RowSampling(
            temperature=submission.temperature,
            top_k=submission.top_k,
            top_p=submission.top_p,
            seed=submission.seed,
            stop_token_ids=pack(list(submission.stop_token_ids)),
        ),
    )
    return engine_pb2.ToEngine(submit=submit).SerializeToString()


def encode_abort(handles: list[int]) -> bytes:
    """The frame that ends requests of this process."""
    return engine_pb2.ToEngine(abort=engine_pb2.Abort(handles=pack(handles, INT64))).SerializeToString()


def encode_forward_abort(request_ids: list[str]) -> bytes:
    """The frame that asks the other api processes to abort."""
    return engine_pb2.ToEngine(forward_abort=engine_pb2.ForwardAbort(request_ids=request_ids)).SerializeToString()


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
                queued_requests=message.status.queued_requests, executors=message.status.executors
            )
            return ClusterStatus(message.status.query_id, response)
        case "forward_abort":
            return ForwardAbort(tuple(message.forward_abort.request_ids))
        case body:
            raise ValueError(f"unknown frame from the engine: {body}")


def _outputs(batch: engine_pb2.OutputBatch) -> Outputs:
    handles = unpack(batch.handles, INT64).tolist()
    token_ids = unpack(batch.token_ids).tolist()
    if len(handles) != len(token_ids):
        raise ValueError("an output batch's columns differ in length")
    finished = [
        (item.handle, Finish(_OUTCOMES.get(item.outcome, Outcome.ERROR), item.cached_tokens, item.message))
        for item in batch.finished
    ]
    return Outputs(handles, token_ids, finished)


def _limits(limits: engine_pb2.Limits) -> EngineLimits:
    return EngineLimits(
        ready_executors=limits.ready_executors,
        max_total_tokens=limits.max_total_tokens,
        vocab_size=limits.vocab_size,
        model_fingerprint=limits.model_fingerprint,
        dtype=limits.dtype,
        scheduler_id=limits.scheduler_id,
    )
