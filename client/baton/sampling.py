"""How tokens are chosen and when a request ends, as one value that several requests share."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

from baton.messages import GenerateOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stop conditions for ``LLM``; clients take the same as keywords: ``**params.options()``.

    The cluster checks the values, so that there is one set of rules for all callers.

    Attributes:
        temperature: 0 = greedy; default 1.
        top_k: sample among the k most likely tokens; default 0 = all.
        top_p: sample among the most likely tokens that together reach this probability, in (0, 1]; default 1.
        seed: same seed, same prompt: same tokens; default: drawn for each request, and returned.
        max_tokens: most tokens to generate; default: as many as the context and the cluster's memory allow.
        stop_token_ids: end at these ids too, at most 16.
        ignore_eos: go on past the checkpoint's end-of-sequence ids.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def options(self) -> GenerateOptions:
        """The same as keywords of ``Client.generate`` and ``Client.stream``."""
        return cast(GenerateOptions, {field.name: getattr(self, field.name) for field in fields(self)})
