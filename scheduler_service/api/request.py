"""A caller's request as plain values, whatever dialect it came in."""

from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, not yet validated; defaults are those of generation.proto.

    Attributes:
        request_id: the caller's name for it; drawn when empty.
        model: empty, or the name of the served model.
        max_tokens: None = as many as fit.
        seed: None = draw one.
        text: whether text is wanted; None = where the checkpoint has a tokenizer.
        echo_prompt: whether the prompt's token ids are wanted back.
    """

    prompt: Prompt | None
    request_id: str = ""
    model: str = ""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    text: bool | None = None
    echo_prompt: bool = True
    skip_special_tokens: bool = True
