from baton_protos import execution_pb2 as _execution_pb2
from baton_protos import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_STOP: _ClassVar[Outcome]
    OUTCOME_LENGTH: _ClassVar[Outcome]
    OUTCOME_ABORT: _ClassVar[Outcome]
    OUTCOME_REJECTED: _ClassVar[Outcome]
    OUTCOME_UNAVAILABLE: _ClassVar[Outcome]
    OUTCOME_ERROR: _ClassVar[Outcome]
    OUTCOME_OVERLOADED: _ClassVar[Outcome]

class ExecutorAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXECUTOR_ACTION_UNSPECIFIED: _ClassVar[ExecutorAction]
    EXECUTOR_ACTION_PAUSE: _ClassVar[ExecutorAction]
    EXECUTOR_ACTION_RESUME: _ClassVar[ExecutorAction]
    EXECUTOR_ACTION_DRAIN: _ClassVar[ExecutorAction]
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_STOP: Outcome
OUTCOME_LENGTH: Outcome
OUTCOME_ABORT: Outcome
OUTCOME_REJECTED: Outcome
OUTCOME_UNAVAILABLE: Outcome
OUTCOME_ERROR: Outcome
OUTCOME_OVERLOADED: Outcome
EXECUTOR_ACTION_UNSPECIFIED: ExecutorAction
EXECUTOR_ACTION_PAUSE: ExecutorAction
EXECUTOR_ACTION_RESUME: ExecutorAction
EXECUTOR_ACTION_DRAIN: ExecutorAction

class ToEngine(_message.Message):
    __slots__ = ("attach", "submit", "abort", "status", "hold", "executor_command", "forward_abort")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_COMMAND_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ABORT_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    submit: Submit
    abort: Abort
    status: StatusQuery
    hold: Hold
    executor_command: ExecutorCommand
    forward_abort: ForwardAbort
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., status: _Optional[_Union[StatusQuery, _Mapping]] = ..., hold: _Optional[_Union[Hold, _Mapping]] = ..., executor_command: _Optional[_Union[ExecutorCommand, _Mapping]] = ..., forward_abort: _Optional[_Union[ForwardAbort, _Mapping]] = ...) -> None: ...

class FromEngine(_message.Message):
    __slots__ = ("limits", "outputs", "status", "executor_command", "forward_abort")
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_COMMAND_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ABORT_FIELD_NUMBER: _ClassVar[int]
    limits: Limits
    outputs: OutputBatch
    status: Status
    executor_command: ExecutorCommandResult
    forward_abort: ForwardAbort
    def __init__(self, limits: _Optional[_Union[Limits, _Mapping]] = ..., outputs: _Optional[_Union[OutputBatch, _Mapping]] = ..., status: _Optional[_Union[Status, _Mapping]] = ..., executor_command: _Optional[_Union[ExecutorCommandResult, _Mapping]] = ..., forward_abort: _Optional[_Union[ForwardAbort, _Mapping]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "prompt_token_ids", "max_tokens", "sampling", "output_token_ids", "cache_salt", "priority", "queue_timeout_ms")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    prompt_token_ids: bytes
    max_tokens: int
    sampling: _execution_pb2.RowSampling
    output_token_ids: bytes
    cache_salt: bytes
    priority: int
    queue_timeout_ms: int
    def __init__(self, handle: _Optional[int] = ..., prompt_token_ids: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_execution_pb2.RowSampling, _Mapping]] = ..., output_token_ids: _Optional[bytes] = ..., cache_salt: _Optional[bytes] = ..., priority: _Optional[int] = ..., queue_timeout_ms: _Optional[int] = ...) -> None: ...

class Hold(_message.Message):
    __slots__ = ("held", "released")
    HELD_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    held: bytes
    released: bytes
    def __init__(self, held: _Optional[bytes] = ..., released: _Optional[bytes] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    def __init__(self, handles: _Optional[bytes] = ...) -> None: ...

class ForwardAbort(_message.Message):
    __slots__ = ("request_ids", "taken_over_at_ns")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    TAKEN_OVER_AT_NS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    taken_over_at_ns: int
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., taken_over_at_ns: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("ready_executors", "max_total_tokens", "vocab_size", "model_fingerprint", "dtype", "scheduler_id", "max_rows")
    READY_EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    ready_executors: int
    max_total_tokens: int
    vocab_size: int
    model_fingerprint: str
    dtype: str
    scheduler_id: str
    max_rows: int
    def __init__(self, ready_executors: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., scheduler_id: _Optional[str] = ..., max_rows: _Optional[int] = ...) -> None: ...

class FinishedRequest(_message.Message):
    __slots__ = ("handle", "outcome", "cached_tokens", "message", "queue_us", "stop_token_id", "executor_losses")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_LOSSES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    outcome: Outcome
    cached_tokens: int
    message: str
    queue_us: int
    stop_token_id: int
    executor_losses: int
    def __init__(self, handle: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., cached_tokens: _Optional[int] = ..., message: _Optional[str] = ..., queue_us: _Optional[int] = ..., stop_token_id: _Optional[int] = ..., executor_losses: _Optional[int] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("handle", "start_position", "logprobs")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    start_position: int
    logprobs: _execution_pb2.LogprobColumns
    def __init__(self, handle: _Optional[int] = ..., start_position: _Optional[int] = ..., logprobs: _Optional[_Union[_execution_pb2.LogprobColumns, _Mapping]] = ...) -> None: ...

class OutputBatch(_message.Message):
    __slots__ = ("handles", "token_ids", "finished", "logprob_indices", "logprobs", "prompt_logprobs", "best_effort_handles")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_INDICES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BEST_EFFORT_HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    token_ids: bytes
    finished: _containers.RepeatedCompositeFieldContainer[FinishedRequest]
    logprob_indices: bytes
    logprobs: _execution_pb2.LogprobColumns
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    best_effort_handles: bytes
    def __init__(self, handles: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., finished: _Optional[_Iterable[_Union[FinishedRequest, _Mapping]]] = ..., logprob_indices: _Optional[bytes] = ..., logprobs: _Optional[_Union[_execution_pb2.LogprobColumns, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ..., best_effort_handles: _Optional[bytes] = ...) -> None: ...

class StatusQuery(_message.Message):
    __slots__ = ("query_id",)
    QUERY_ID_FIELD_NUMBER: _ClassVar[int]
    query_id: int
    def __init__(self, query_id: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("query_id", "queued_requests", "executors", "oldest_queued_us", "executor_losses", "dropped_frames")
    QUERY_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_QUEUED_US_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_LOSSES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    query_id: int
    queued_requests: int
    executors: _containers.RepeatedCompositeFieldContainer[_generation_pb2.ExecutorStatus]
    oldest_queued_us: int
    executor_losses: _containers.RepeatedCompositeFieldContainer[ReasonCount]
    dropped_frames: _containers.RepeatedCompositeFieldContainer[ReasonCount]
    def __init__(self, query_id: _Optional[int] = ..., queued_requests: _Optional[int] = ..., executors: _Optional[_Iterable[_Union[_generation_pb2.ExecutorStatus, _Mapping]]] = ..., oldest_queued_us: _Optional[int] = ..., executor_losses: _Optional[_Iterable[_Union[ReasonCount, _Mapping]]] = ..., dropped_frames: _Optional[_Iterable[_Union[ReasonCount, _Mapping]]] = ...) -> None: ...

class ReasonCount(_message.Message):
    __slots__ = ("reason", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    count: int
    def __init__(self, reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class ExecutorCommand(_message.Message):
    __slots__ = ("query_id", "executor_id", "action")
    QUERY_ID_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    query_id: int
    executor_id: str
    action: ExecutorAction
    def __init__(self, query_id: _Optional[int] = ..., executor_id: _Optional[str] = ..., action: _Optional[_Union[ExecutorAction, str]] = ...) -> None: ...

class ExecutorCommandResult(_message.Message):
    __slots__ = ("query_id", "known")
    QUERY_ID_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    query_id: int
    known: bool
    def __init__(self, query_id: _Optional[int] = ..., known: _Optional[bool] = ...) -> None: ...
