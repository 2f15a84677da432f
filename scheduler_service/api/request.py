"""A caller's request as plain values, whatever dialect it came in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class StructuredKind(Enum):
    """What the text of a StructuredOutput is."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the output's text must be.

    Attributes:
        texts: the schema, the expression, the grammar, or the choices; empty for any JSON object.
    """

    kind: StructuredKind
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; units and order of application are those of generation.proto.

    Attributes:
        seed: None = draw one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()
    structured: StructuredOutput | None = None


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a sample ends.

    Attributes:
        max_tokens: None = as many as fit.
        deadline_unix_ms: 0 = none.
    """

    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    deadline_unix_ms: int = 0


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What is sent back.

    Attributes:
        text: None = where the checkpoint has a tokenizer.
        prompt_token_ids: whether they are echoed.
        logprobs: of the sampled token and of this many most likely ones; None = none at all.
        prompt_logprobs: likewise, of the prompt's tokens.
        processed_logprobs: of the distribution that is sampled from instead of the model's own.
    """

    text: bool | None = None
    prompt_token_ids: bool = True
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    processed_logprobs: bool = False
    timings: bool = False


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """How far a caller has got with a sample: all its output so far, and code points of text received."""

    sample: int
    token_ids: Sequence[int]
    text_offset: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, not yet validated; defaults are those of generation.proto.

    Attributes:
        request_id: the caller's name for it; drawn when empty.
        model: empty, or the name of the served model.
        n: parallel samples.
        tenant: whose request it is; the empty name is a tenant like any other.
        queue_timeout_ms: 0 = the scheduler's own limit.
        resume: at most one point per sample.
        resume_window_ms: how long the request outlives a lost connection.
    """

    prompt: Prompt | None
    request_id: str = ""
    model: str = ""
    sampling: Sampling = Sampling()
    stop: StopConditions = StopConditions()
    output: OutputOptions = OutputOptions()
    n: int = 1
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    queue_timeout_ms: int = 0
    resume: tuple[ResumePoint, ...] = ()
    resume_window_ms: int = 0
