"""What the client takes and returns: plain immutable values, no protobuf types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; ``role`` is what the checkpoint's chat template knows, such as ``"user"``."""

    role: str
    content: str


# Text, token ids, or a conversation.
Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, str]]


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence or stop id
    LENGTH = "length"  # max_tokens, or the context's end
    ABORT = "abort"  # somebody aborted it by its id


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; ``cached_tokens`` are the prompt tokens that came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """News of a stream. ``text`` is what became certain and need not align with ``token_ids``; either may be empty.

    ``token_index`` is the absolute index of ``token_ids[0]`` in the output, ``text_offset`` the offset of ``text``
    in the output's text, in code points.
    """

    text: str
    token_ids: tuple[int, ...]
    token_index: int
    text_offset: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. Sending ``prompt_token_ids`` again with ``seed`` gives the same tokens on an equal
    ``model_fingerprint``."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    prompt_token_ids: tuple[int, ...]
    seed: int
    request_id: str
    model_fingerprint: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model; ``max_total_tokens`` bounds prompt and output of one request together."""

    model: str
    model_fingerprint: str
    architectures: tuple[str, ...]
    dtype: str
    vocab_size: int
    max_total_tokens: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class ExecutorStatus:
    """One executor as the scheduler sees it. Blocks: total = free + cached + used; times in microseconds."""

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


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster; ``queued_requests`` wait for an executor to be chosen."""

    scheduler_id: str
    queued_requests: int
    executors: tuple[ExecutorStatus, ...]
