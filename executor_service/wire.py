"""Frames of execution.proto <-> plain values. Generated types stop here."""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from baton_protos import execution_pb2 as pb
from baton_protos.columns import FLOAT32, INT32, UINT8, UINT32, pack, unpack
from executor_service.step_plan import (
    Admission,
    Fault,
    LogprobColumns,
    MalformedPlan,
    RowSampling,
    StepPlan,
    StepResult,
)

PROTOCOL_VERSION = 1

_UINT32_MAX = 0xFFFFFFFF
_FAULT_MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True)
class Header:
    """The envelope around a body; see execution.proto."""

    scheduler_id: str
    boot_id: int
    epoch: int
    seq: int
    acked: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What this executor is and can hold, reported in its Hello."""

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
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hello:
    """Asks the scheduler for a session; ``nonce`` ties the Welcome to it."""

    nonce: int
    capacity: Capacity


@dataclass(frozen=True, slots=True)
class Ready:
    """Rows, tables and queues of the new epoch are clear."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The scheduler's answer to a Hello; times in milliseconds."""

    nonce: int
    accepted: bool
    reject_reason: str
    heartbeat_ms: int
    lease_ms: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Highest step received and highest whose result was sent (executor), or dispatched and settled (scheduler)."""

    last_step: int
    last_settled_step: int


@dataclass(frozen=True, slots=True)
class Drain:
    """To the scheduler: let this executor go. From it: the executor is let go. ``redirect``: to another scheduler."""

    redirect: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks a scheduler how much it needs an executor."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Census:
    """The answer to a Probe: a scheduler's executors, and the requests that wait for one."""

    nonce: int
    executors: int
    queued_requests: int


Outgoing = Hello | Ready | StepResult | Heartbeat | Fault | Drain | Probe
Incoming = Welcome | StepPlan | MalformedPlan | Heartbeat | Drain | Census


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame; ``body`` is None when this build does not know its kind."""

    header: Header
    body: Incoming | None


class WireError(Exception):
    """The frame is not an Envelope."""


class VersionError(WireError):
    """The frame speaks another protocol version."""


def decode(data: bytes) -> Frame:
    """Decode a frame from the scheduler.

    Raises:
        VersionError: another protocol version.
        WireError: not an Envelope.
    """
    try:
        envelope = pb.Envelope.FromString(data)
    except DecodeError as error:
        raise WireError("not an Envelope") from error
    if envelope.version != PROTOCOL_VERSION:
        raise VersionError(f"protocol version {envelope.version}, this executor speaks {PROTOCOL_VERSION}")
    header = Header(envelope.scheduler_id, envelope.boot_id, envelope.epoch, envelope.seq, envelope.acked)
    return Frame(header, _decode_body(envelope))


def decode_census(data: bytes) -> Census | None:
    """The Census in a frame; None if it is anything else."""
    try:
        body = decode(data).body
    except WireError:
        return None
    return body if isinstance(body, Census) else None


def _decode_body(envelope: pb.Envelope) -> Incoming | None:
    match envelope.WhichOneof("body"):
        case "plan":
            return _decode_plan(envelope.plan)
        case "heartbeat":
            return Heartbeat(envelope.heartbeat.last_step, envelope.heartbeat.last_settled_step)
        case "welcome":
            welcome = envelope.welcome
            return Welcome(
                welcome.nonce, welcome.accepted, welcome.reject_reason, welcome.heartbeat_ms, welcome.lease_ms
            )
        case "drain":
            return Drain(envelope.drain.redirect)
        case "census":
            census = envelope.census
            return Census(census.nonce, census.executors, census.queued_requests)
    return None


def _decode_plan(plan: pb.StepPlan) -> StepPlan | MalformedPlan:
    try:
        return StepPlan(
            step_id=plan.step_id,
            released_rows=unpack(plan.released_rows, INT32),
            admissions=tuple(_decode_admission(admission) for admission in plan.admissions),
            extend_rows=unpack(plan.extend_rows, INT32),
            extend_blocks=unpack(plan.extend_blocks, INT32),
            rows=unpack(plan.rows, INT32),
            num_tokens=unpack(plan.num_tokens, INT32),
            start_positions=unpack(plan.start_positions, INT32),
            flags=unpack(plan.flags, UINT8),
            prefill_token_ids=unpack(plan.prefill_token_ids, INT32),
            slot_mapping=unpack(plan.slot_mapping, INT32),
            table_hashes=unpack(plan.table_hashes, UINT32),
            after_idle=plan.after_idle,
        )
    except ValueError as error:
        return MalformedPlan(plan.step_id, f"a column is not a whole number of elements: {error}")


def _decode_admission(admission: pb.Admission) -> Admission:
    return Admission(
        row=admission.row,
        block_ids=unpack(admission.block_ids, INT32),
        sampling=_decode_sampling(admission.sampling),
        prompt_len=admission.prompt_len,
        token_ids=unpack(admission.token_ids, INT32),
        audit_from=admission.audit_from,
    )


def _decode_sampling(sampling: pb.RowSampling) -> RowSampling:
    return RowSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        seed=sampling.seed,
        bias_token_ids=unpack(sampling.bias_token_ids, INT32),
        bias_values=unpack(sampling.bias_values, FLOAT32),
        allowed_token_ids=unpack(sampling.allowed_token_ids, INT32),
        banned_token_ids=unpack(sampling.banned_token_ids, INT32),
        min_tokens=sampling.min_tokens,
        stop_token_ids=unpack(sampling.stop_token_ids, INT32),
        grammar=sampling.grammar,
        num_logprobs=sampling.num_logprobs if sampling.HasField("num_logprobs") else None,
        processed_logprobs=sampling.processed_logprobs,
        num_prompt_logprobs=sampling.num_prompt_logprobs if sampling.HasField("num_prompt_logprobs") else None,
    )


def encode(header: Header, body: Outgoing) -> bytes:
    """The frame of ``body`` under ``header``."""
    envelope = pb.Envelope(
        version=PROTOCOL_VERSION,
        scheduler_id=header.scheduler_id,
        boot_id=header.boot_id,
        epoch=header.epoch,
        seq=header.seq,
        acked=header.acked,
    )
    match body:
        case StepResult():
            _fill_result(envelope.result, body)
        case Heartbeat():
            envelope.heartbeat.last_step = body.last_step
            envelope.heartbeat.last_settled_step = body.last_settled_step
        case Hello():
            _fill_hello(envelope.hello, body)
        case Ready():
            envelope.ready.SetInParent()
        case Drain():
            envelope.drain.SetInParent()
            envelope.drain.redirect = body.redirect
        case Probe():
            envelope.probe.nonce = body.nonce
        case Fault():
            envelope.fault.step_id = body.step_id
            envelope.fault.code = body.code.value  # type: ignore[assignment]  # the enum is an int on the wire
            envelope.fault.message = body.message[:_FAULT_MESSAGE_CHARS]
    return envelope.SerializeToString()


def _fill_result(message: pb.StepResult, result: StepResult) -> None:
    message.step_id = result.step_id
    message.token_ids = pack(result.token_ids, INT32)
    message.row_status = pack(result.row_status, UINT8)
    message.timings.queued_us = _uint32(result.timings.queued_us)
    message.timings.device_us = _uint32(result.timings.device_us)
    message.timings.starved_us = _uint32(result.timings.starved_us)
    message.timings.plans_queued = _uint32(result.timings.plans_queued)
    if result.logprobs is not None:
        _fill_logprobs(message.logprobs, result.logprobs)
    for part in result.prompt_logprobs:
        entry = message.prompt_logprobs.add(row=part.row, start_position=part.start_position)
        _fill_logprobs(entry.logprobs, part.logprobs)
    message.audited_tokens = result.audited_tokens
    message.audit_mismatch_rows = pack(result.audit_mismatch_rows, INT32)
    message.grammar_ended = pack(result.grammar_ended, UINT8)


def _fill_logprobs(message: pb.LogprobColumns, columns: LogprobColumns) -> None:
    message.logprobs = pack(columns.logprobs, FLOAT32)
    message.ranks = pack(columns.ranks, INT32)
    message.top_counts = pack(columns.top_counts, INT32)
    message.top_token_ids = pack(columns.top_token_ids, INT32)
    message.top_logprobs = pack(columns.top_logprobs, FLOAT32)


def _fill_hello(message: pb.Hello, hello: Hello) -> None:
    capacity = hello.capacity
    message.nonce = hello.nonce
    message.executor_id = capacity.executor_id
    message.model = capacity.model
    message.model_fingerprint = capacity.model_fingerprint
    message.kernel_fingerprint = capacity.kernel_fingerprint
    message.device = capacity.device
    message.dtype = capacity.dtype
    message.vocab_size = capacity.vocab_size
    message.max_model_len = capacity.max_model_len
    message.block_size = capacity.block_size
    message.num_blocks = capacity.num_blocks
    message.max_rows = capacity.max_rows
    message.max_batched_tokens = capacity.max_batched_tokens
    message.pipeline_depth = 1
    message.features.extend(capacity.features)


def _uint32(value: int) -> int:
    return min(max(value, 0), _UINT32_MAX)
