"""Completions as JSON objects."""

from dataclasses import asdict
from typing import Any

from baton.values import Completion, Sample

_ALWAYS = ("text", "token_ids", "finish_reason", "seed")


def completion_object(completion: Completion) -> dict[str, Any]:
    """The first sample's output and what is said of the whole request; all samples where there are several."""
    result = {
        **sample_object(completion.samples[0]),
        "usage": asdict(completion.usage),
        "seed": completion.seed,
    }
    if completion.prompt_logprobs:
        result["prompt_logprobs"] = [asdict(one) for one in completion.prompt_logprobs]
    if len(completion.samples) > 1:
        result["samples"] = [sample_object(sample) for sample in completion.samples]
    return result


def sample_object(sample: Sample) -> dict[str, Any]:
    """A sample, without what was not asked for."""
    values = asdict(sample)
    del values["index"]
    return {name: value for name, value in values.items() if name in _ALWAYS or value not in (None, ())}
