from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FaultCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAULT_CODE_UNSPECIFIED: _ClassVar[FaultCode]
    FAULT_CODE_BAD_PLAN: _ClassVar[FaultCode]
    FAULT_CODE_GAP: _ClassVar[FaultCode]
    FAULT_CODE_MISMATCH: _ClassVar[FaultCode]
    FAULT_CODE_OUT_OF_MEMORY: _ClassVar[FaultCode]
    FAULT_CODE_DEVICE_ERROR: _ClassVar[FaultCode]
FAULT_CODE_UNSPECIFIED: FaultCode
FAULT_CODE_BAD_PLAN: FaultCode
FAULT_CODE_GAP: FaultCode
FAULT_CODE_MISMATCH: FaultCode
FAULT_CODE_OUT_OF_MEMORY: FaultCode
FAULT_CODE_DEVICE_ERROR: FaultCode

class Envelope(_message.Message):
    __slots__ = ("version", "scheduler_id", "boot_id", "epoch", "seq", "acked", "hello", "welcome", "ready", "plan", "result", "heartbeat", "fault", "drain", "probe", "census")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    CENSUS_FIELD_NUMBER: _ClassVar[int]
    version: int
    scheduler_id: str
    boot_id: int
    epoch: int
    seq: int
    acked: int
    hello: Hello
    welcome: Welcome
    ready: Ready
    plan: StepPlan
    result: StepResult
    heartbeat: Heartbeat
    fault: Fault
    drain: Drain
    probe: Probe
    census: Census
    def __init__(self, version: _Optional[int] = ..., scheduler_id: _Optional[str] = ..., boot_id: _Optional[int] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., acked: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., census: _Optional[_Union[Census, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("nonce", "executor_id", "model", "model_fingerprint", "kernel_fingerprint", "device", "dtype", "vocab_size", "max_model_len", "block_size", "num_blocks", "num_host_blocks", "max_rows", "max_batched_tokens", "num_state_slots", "pipeline_depth", "features")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STATE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
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
    num_host_blocks: int
    max_rows: int
    max_batched_tokens: int
    num_state_slots: int
    pipeline_depth: int
    features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, nonce: _Optional[int] = ..., executor_id: _Optional[str] = ..., model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., kernel_fingerprint: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_host_blocks: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_batched_tokens: _Optional[int] = ..., num_state_slots: _Optional[int] = ..., pipeline_depth: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("nonce", "accepted", "reject_reason", "heartbeat_ms", "lease_ms")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECT_REASON_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    accepted: bool
    reject_reason: str
    heartbeat_ms: int
    lease_ms: int
    def __init__(self, nonce: _Optional[int] = ..., accepted: _Optional[bool] = ..., reject_reason: _Optional[str] = ..., heartbeat_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RowSampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed", "bias_token_ids", "bias_values", "allowed_token_ids", "banned_token_ids", "min_tokens", "stop_token_ids", "grammar", "num_logprobs", "processed_logprobs", "num_prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BANNED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    bias_token_ids: bytes
    bias_values: bytes
    allowed_token_ids: bytes
    banned_token_ids: bytes
    min_tokens: int
    stop_token_ids: bytes
    grammar: str
    num_logprobs: int
    processed_logprobs: bool
    num_prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., bias_token_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., allowed_token_ids: _Optional[bytes] = ..., banned_token_ids: _Optional[bytes] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[bytes] = ..., grammar: _Optional[str] = ..., num_logprobs: _Optional[int] = ..., processed_logprobs: _Optional[bool] = ..., num_prompt_logprobs: _Optional[int] = ...) -> None: ...

class LogprobColumns(_message.Message):
    __slots__ = ("logprobs", "ranks", "top_counts", "top_token_ids", "top_logprobs")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TOP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: bytes
    ranks: bytes
    top_counts: bytes
    top_token_ids: bytes
    top_logprobs: bytes
    def __init__(self, logprobs: _Optional[bytes] = ..., ranks: _Optional[bytes] = ..., top_counts: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("row", "block_ids", "sampling", "prompt_len", "token_ids", "audit_from")
    ROW_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FROM_FIELD_NUMBER: _ClassVar[int]
    row: int
    block_ids: bytes
    sampling: RowSampling
    prompt_len: int
    token_ids: bytes
    audit_from: int
    def __init__(self, row: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[RowSampling, _Mapping]] = ..., prompt_len: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., audit_from: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step_id", "released_rows", "admissions", "extend_rows", "extend_blocks", "rows", "num_tokens", "start_positions", "flags", "prefill_token_ids", "slot_mapping", "table_hashes", "after_idle")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASED_ROWS_FIELD_NUMBER: _ClassVar[int]
    ADMISSIONS_FIELD_NUMBER: _ClassVar[int]
    EXTEND_ROWS_FIELD_NUMBER: _ClassVar[int]
    EXTEND_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    START_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SLOT_MAPPING_FIELD_NUMBER: _ClassVar[int]
    TABLE_HASHES_FIELD_NUMBER: _ClassVar[int]
    AFTER_IDLE_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    released_rows: bytes
    admissions: _containers.RepeatedCompositeFieldContainer[Admission]
    extend_rows: bytes
    extend_blocks: bytes
    rows: bytes
    num_tokens: bytes
    start_positions: bytes
    flags: bytes
    prefill_token_ids: bytes
    slot_mapping: bytes
    table_hashes: bytes
    after_idle: bool
    def __init__(self, step_id: _Optional[int] = ..., released_rows: _Optional[bytes] = ..., admissions: _Optional[_Iterable[_Union[Admission, _Mapping]]] = ..., extend_rows: _Optional[bytes] = ..., extend_blocks: _Optional[bytes] = ..., rows: _Optional[bytes] = ..., num_tokens: _Optional[bytes] = ..., start_positions: _Optional[bytes] = ..., flags: _Optional[bytes] = ..., prefill_token_ids: _Optional[bytes] = ..., slot_mapping: _Optional[bytes] = ..., table_hashes: _Optional[bytes] = ..., after_idle: _Optional[bool] = ...) -> None: ...

class StepTimings(_message.Message):
    __slots__ = ("queued_us", "device_us", "starved_us", "plans_queued")
    QUEUED_US_FIELD_NUMBER: _ClassVar[int]
    DEVICE_US_FIELD_NUMBER: _ClassVar[int]
    STARVED_US_FIELD_NUMBER: _ClassVar[int]
    PLANS_QUEUED_FIELD_NUMBER: _ClassVar[int]
    queued_us: int
    device_us: int
    starved_us: int
    plans_queued: int
    def __init__(self, queued_us: _Optional[int] = ..., device_us: _Optional[int] = ..., starved_us: _Optional[int] = ..., plans_queued: _Optional[int] = ...) -> None: ...

class RowPromptLogprobs(_message.Message):
    __slots__ = ("row", "start_position", "logprobs")
    ROW_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    row: int
    start_position: int
    logprobs: LogprobColumns
    def __init__(self, row: _Optional[int] = ..., start_position: _Optional[int] = ..., logprobs: _Optional[_Union[LogprobColumns, _Mapping]] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step_id", "token_ids", "row_status", "timings", "logprobs", "prompt_logprobs", "audited_tokens", "audit_mismatch_rows", "grammar_ended")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ROW_STATUS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    AUDITED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_MISMATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_ENDED_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    token_ids: bytes
    row_status: bytes
    timings: StepTimings
    logprobs: LogprobColumns
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[RowPromptLogprobs]
    audited_tokens: int
    audit_mismatch_rows: bytes
    grammar_ended: bytes
    def __init__(self, step_id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., row_status: _Optional[bytes] = ..., timings: _Optional[_Union[StepTimings, _Mapping]] = ..., logprobs: _Optional[_Union[LogprobColumns, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[RowPromptLogprobs, _Mapping]]] = ..., audited_tokens: _Optional[int] = ..., audit_mismatch_rows: _Optional[bytes] = ..., grammar_ended: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("last_step", "last_settled_step")
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_SETTLED_STEP_FIELD_NUMBER: _ClassVar[int]
    last_step: int
    last_settled_step: int
    def __init__(self, last_step: _Optional[int] = ..., last_settled_step: _Optional[int] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("step_id", "code", "message")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    code: FaultCode
    message: str
    def __init__(self, step_id: _Optional[int] = ..., code: _Optional[_Union[FaultCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("redirect",)
    REDIRECT_FIELD_NUMBER: _ClassVar[int]
    redirect: str
    def __init__(self, redirect: _Optional[str] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class Census(_message.Message):
    __slots__ = ("nonce", "executors", "queued_requests")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    executors: int
    queued_requests: int
    def __init__(self, nonce: _Optional[int] = ..., executors: _Optional[int] = ..., queued_requests: _Optional[int] = ...) -> None: ...
