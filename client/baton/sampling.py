"""How tokens are chosen and when a request ends, as one value that several requests share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from baton.options import GenerateOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling, stop conditions and log probabilities for ``LLM``; clients take the same as keywords:
    ``**params.options()``.

    What each of them means, and its default, is said at ``GenerateOptions``. The cluster checks the values, so that
    there is one set of rules for all callers.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] | None = None
    json_schema: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: str | Sequence[str] | None = None
    grammar: str | None = None
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    include_stop: bool | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    processed_logprobs: bool | None = None
    skip_special_tokens: bool | None = None

    def options(self) -> GenerateOptions:
        """The same as keywords of ``Client.generate`` and ``Client.stream``."""
        return cast(GenerateOptions, {field.name: getattr(self, field.name) for field in fields(self)})
