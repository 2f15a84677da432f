"""The engine's status as the launcher asks for it: engine.proto <-> plain values. Generated types stop here."""

from collections.abc import Iterable

from baton_protos import engine_pb2 as pb
from scheduler_service.engine.api_wire import ExecutorStatus, Status, WireError


def encode_query() -> bytes:
    """The frame that asks the engine for its status."""
    return pb.ToEngine(status=pb.StatusQuery()).SerializeToString()


def decode_status(frame: bytes) -> Status:
    """The engine's answer.

    Raises:
        ValueError: the frame is malformed (protobuf's DecodeError is one), or another kind of frame.
    """
    message = pb.FromEngine.FromString(frame)
    if message.WhichOneof("body") != "status":
        raise WireError(f"expected a status, not {message.WhichOneof('body')}")
    status = message.status
    return Status(
        query_id=status.query_id,
        queued_requests=status.queued_requests,
        executors=[
            ExecutorStatus(**{name: getattr(executor, name) for name in ExecutorStatus.__slots__})
            for executor in status.executors
        ],
        oldest_queued_us=status.oldest_queued_us,
        executor_losses=_decode_counts(status.executor_losses),
        dropped_frames=_decode_counts(status.dropped_frames),
    )


def _decode_counts(counts: Iterable[pb.ReasonCount]) -> dict[str, int]:
    return {item.reason: item.count for item in counts}
