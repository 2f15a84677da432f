"""Frames between scheduler and executors (execution.proto) as plain values. Generated types stop here."""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from baton_protos import execution_pb2 as pb
from baton_protos.columns import FLOAT32, UINT8, UINT32, pack, unpack
from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.step_plan import Admission, RowPromptLogprobs, StepPlan, StepResult, StepTimings

PROTOCOL_VERSION = 1


class WireError(ValueError):
    """A frame that does not decode or contradicts itself."""


@dataclass(frozen=True, slots=True)
class Header:
    """Whose frame it is. ``acked``: highest step received (from an executor) or settled (from the scheduler)."""

    scheduler_id: str
    boot_id: int
    epoch: int
    seq: int
    acked: int


@dataclass(frozen=True, slots=True)
class Hello:
    """An executor introduces itself and reports its capacity."""

    nonce: int
    executor_id: str
    model: str
    model_fingerprint: str
    kernel_fingerprint: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_rows: int
    max_batched_tokens: int
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to a Hello; ``reject_reason`` empty = accepted. Times are milliseconds."""

    nonce: int
    reject_reason: str
    heartbeat_ms: int
    lease_ms: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The executor has cleared its rows and takes plans."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """From an executor: highest step received and answered. From the scheduler: highest step dispatched and settled."""

    last_step: int
    last_settled_step: int


@dataclass(frozen=True, slots=True)
class Fault:
    """The executor stopped at a step; it applies nothing more until a new Welcome."""

    step_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Drain:
    """From an executor: it wants to leave. From the scheduler: it is let go. ``redirect``: to another scheduler."""

    redirect: str


@dataclass(frozen=True, slots=True)
class Probe:
    """An executor asks how much this scheduler needs it."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Census:
    """The answer: executors that take plans, and requests that wait for one."""

    nonce: int
    executors: int
    queued_requests: int


FromExecutor = Hello | Ready | StepResult | Heartbeat | Fault | Drain | Probe


def decode(frame: bytes) -> tuple[Header, FromExecutor]:
    """One frame from an executor.

    Raises:
        WireError: it does not decode, has another protocol version, or nothing known inside.
    """
    try:
        envelope = pb.Envelope.FromString(frame)
    except DecodeError as error:
        raise WireError("not an Envelope") from error
    if envelope.version != PROTOCOL_VERSION:
        raise WireError(f"protocol version {envelope.version}, expected {PROTOCOL_VERSION}")
    header = Header(envelope.scheduler_id, envelope.boot_id, envelope.epoch, envelope.seq, envelope.acked)
    return header, _decode_body(envelope)


def _decode_body(envelope: pb.Envelope) -> FromExecutor:
    match envelope.WhichOneof("body"):
        case "result":
            return _decode_result(envelope.result)
        case "heartbeat":
            return Heartbeat(envelope.heartbeat.last_step, envelope.heartbeat.last_settled_step)
        case "hello":
            return _decode_hello(envelope.hello)
        case "ready":
            return Ready()
        case "fault":
            fault = envelope.fault
            code = pb.FaultCode.Name(fault.code) if fault.code in pb.FaultCode.values() else str(fault.code)
            return Fault(fault.step_id, code.removeprefix("FAULT_CODE_"), fault.message)
        case "drain":
            return Drain(envelope.drain.redirect)
        case "probe":
            return Probe(envelope.probe.nonce)
        case kind:
            raise WireError(f"unexpected body {kind}")


def _decode_hello(hello: pb.Hello) -> Hello:
    return Hello(
        nonce=hello.nonce,
        executor_id=hello.executor_id,
        model=hello.model,
        model_fingerprint=hello.model_fingerprint,
        kernel_fingerprint=hello.kernel_fingerprint,
        device=hello.device,
        dtype=hello.dtype,
        vocab_size=hello.vocab_size,
        max_model_len=hello.max_model_len,
        block_size=hello.block_size,
        num_blocks=hello.num_blocks,
        max_rows=hello.max_rows,
        max_batched_tokens=hello.max_batched_tokens,
        features=tuple(hello.features),
    )


def _decode_result(result: pb.StepResult) -> StepResult:
    timings = result.timings
    try:
        return StepResult(
            step_id=result.step_id,
            token_ids=unpack(result.token_ids),
            row_status=unpack(result.row_status, UINT8),
            timings=StepTimings(timings.queued_us, timings.device_us, timings.starved_us, timings.plans_queued),
            logprobs=_decode_logprobs(result.logprobs) if result.HasField("logprobs") else None,
            prompt_logprobs=tuple(_decode_prompt_logprobs(item) for item in result.prompt_logprobs),
            audited_tokens=result.audited_tokens,
            audit_mismatch_rows=unpack(result.audit_mismatch_rows),
            grammar_ended=unpack(result.grammar_ended, UINT8),
        )
    except ValueError as error:
        raise WireError("a column of a result is cut short") from error


def _decode_prompt_logprobs(item: pb.RowPromptLogprobs) -> RowPromptLogprobs:
    return RowPromptLogprobs(item.row, item.start_position, _decode_logprobs(item.logprobs))


def _decode_logprobs(columns: pb.LogprobColumns) -> LogprobColumns:
    return LogprobColumns(
        logprobs=unpack(columns.logprobs, FLOAT32),
        ranks=unpack(columns.ranks),
        top_counts=unpack(columns.top_counts),
        top_token_ids=unpack(columns.top_token_ids),
        top_logprobs=unpack(columns.top_logprobs, FLOAT32),
    )


def encode(header: Header, body: Welcome | StepPlan | Heartbeat | Drain | Census) -> bytes:
    """One frame to an executor."""
    envelope = pb.Envelope(
        version=PROTOCOL_VERSION,
        scheduler_id=header.scheduler_id,
        boot_id=header.boot_id,
        epoch=header.epoch,
        seq=header.seq,
        acked=header.acked,
    )
    match body:
        case StepPlan():
            envelope.plan.CopyFrom(_encode_plan(body))
        case Heartbeat():
            envelope.heartbeat.last_step = body.last_step
            envelope.heartbeat.last_settled_step = body.last_settled_step
        case Welcome():
            envelope.welcome.nonce = body.nonce
            envelope.welcome.accepted = not body.reject_reason
            envelope.welcome.reject_reason = body.reject_reason
            envelope.welcome.heartbeat_ms = body.heartbeat_ms
            envelope.welcome.lease_ms = body.lease_ms
        case Drain():
            envelope.drain.redirect = body.redirect
        case Census():
            envelope.census.nonce = body.nonce
            envelope.census.executors = body.executors
            envelope.census.queued_requests = body.queued_requests
    return envelope.SerializeToString()


def _encode_plan(plan: StepPlan) -> pb.StepPlan:
    return pb.StepPlan(
        step_id=plan.step_id,
        released_rows=pack(plan.released_rows),
        admissions=[_encode_admission(admission) for admission in plan.admissions],
        extend_rows=pack(plan.extend_rows),
        extend_blocks=pack(plan.extend_blocks),
        rows=pack(plan.rows),
        num_tokens=pack(plan.num_tokens),
        start_positions=pack(plan.start_positions),
        flags=pack(plan.flags, UINT8),
        prefill_token_ids=pack(plan.prefill_token_ids),
        slot_mapping=pack(plan.slot_mapping),
        table_hashes=pack(plan.table_hashes, UINT32),
        after_idle=plan.after_idle,
    )


def _encode_admission(admission: Admission) -> pb.Admission:
    encoded = pb.Admission(
        row=admission.row,
        block_ids=pack(admission.block_ids),
        prompt_len=admission.num_prompt_tokens,
        token_ids=pack(admission.token_ids),
        audit_from=admission.audit_from,
    )
    encoded.sampling.MergeFromString(admission.sampling.encoded)
    return encoded
