"""The options of a request, and where each goes in the message."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from baton.errors import InvalidRequestError
from baton_protos import generation_pb2 as pb


class GenerateOptions(TypedDict, total=False):
    """Everything of a request but its prompt; what is left out, or None, is the cluster's choice.

    Keys:
        max_tokens: most tokens to generate; default: as many as the context and the cluster's memory allow.
        min_tokens: no stop of any kind before this many tokens.
        temperature: 0 = greedy, or from 0.0001 to 100; default 1.
        top_k: sample among the k most likely tokens; default 0 = all.
        top_p: sample among the most likely tokens that together reach this probability, in (0, 1]; default 1.
        min_p: drop tokens less likely than this share of the most likely one's probability; default 0.
        repetition_penalty: above 1 makes tokens of prompt and output less likely, in [0.01, 10]; default 1.
        frequency_penalty: subtracted from logits for every occurrence in the output, in [-2, 2]; default 0.
        presence_penalty: subtracted from logits of tokens in the output, in [-2, 2]; default 0.
        logit_bias: token id -> what is added to its logit, in [-100, 100].
        allowed_token_ids: only these may be sampled (list end-of-sequence ids too); default: all.
        banned_token_ids: never sampled.
        json_schema: the text is JSON that this schema, a mapping or JSON text, allows. The request ends with it. Of
            this and the next four at most one may be given.
        json_object: the text is any JSON object.
        regex: the whole text matches this regular expression.
        choice: the text is one of these.
        grammar: the text follows this Lark-like grammar, as llguidance reads it.
        seed: same seed, same request: same tokens; default: drawn by the scheduler, and returned.
        n: parallel samples; default 1.
        stop: end where this text, or one of these, first appears; it is not sent. At most 16.
        include_stop: send the stop string too.
        stop_token_ids: end at these ids too, at most 16 with the checkpoint's own.
        ignore_eos: go on past the checkpoint's end-of-sequence ids.
        deadline: end with what there is at this time, in seconds since the epoch, as ``time.time()`` counts.
        logprobs: log probabilities of each token, and of this many most likely ones at its place; at most 20.
        prompt_logprobs: the same for the prompt's tokens.
        processed_logprobs: of the distribution that is sampled from instead of the model's own.
        text: whether text is wanted, besides token ids; default: where the checkpoint has a tokenizer.
        skip_special_tokens: leave special tokens out of the text; default True.
        timings: report when tokens came.
        request_id: a name for ``abort`` and logs, at most 128 characters; default: drawn by the scheduler.
        model: the name of the served model, to be sure of it; default: whichever is served.
        priority: lower runs first, in [-1000, 1000]; default 0.
        tenant: whose request it is; where the cluster asks for tokens, they say it.
        cache_salt: share cached prefixes only with requests of the same tenant and salt.
        queue_timeout: fail unless it has started within this many seconds; default: the scheduler's own limit.
        resume_window: seconds that the request outlives a lost connection (a closed stream ends it); it needs a
            request_id.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    banned_token_ids: Sequence[int] | None
    json_schema: str | Mapping[str, Any] | None
    json_object: bool | None
    regex: str | None
    choice: str | Sequence[str] | None
    grammar: str | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    include_stop: bool | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    deadline: float | None
    logprobs: int | None
    prompt_logprobs: int | None
    processed_logprobs: bool | None
    text: bool | None
    skip_special_tokens: bool | None
    timings: bool | None
    request_id: str | None
    model: str | None
    priority: int | None
    tenant: str | None
    cache_salt: str | None
    queue_timeout: float | None
    resume_window: float | None


def fill_options(request: pb.GenerateRequest, options: Mapping[str, Any]) -> None:
    """Sets what ``options`` say; values of None are as good as left out.

    Raises:
        InvalidRequestError: a value does not fit its field, such as a negative token id; the cluster checks the rest.
        TypeError: there is no such option.
    """
    _check_structured(options)
    for name, value in options.items():
        if (path := PATHS.get(name)) is None:
            raise TypeError(f"there is no option {name!r}")
        if value is not None:
            fill(request, path, _CONVERSIONS.get(name, _as_it_is)(value))


def fill(request: Any, path: str, value: Any, blame: str = "") -> None:
    """Sets a field, or fills a list or mapping.

    Raises:
        InvalidRequestError: the value does not fit; it names the field ``blame``, or else ``path``.
    """
    blame = blame or path
    message = request
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    field = message.DESCRIPTOR.fields_by_name[name]
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif field.is_repeated:
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidRequestError(f"{blame}: {reason}", field=blame) from error


def _as_it_is(value: Any) -> Any:
    return value


def _milliseconds(seconds: Any) -> Any:
    """Not rounded to nothing: 0 would mean that there is no limit."""
    return max(1, round(seconds * 1000)) if isinstance(seconds, int | float) and seconds > 0 else seconds


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _json_text(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value


def _check_structured(options: Mapping[str, Any]) -> None:
    """The message holds one format, the last that is set; an empty choice would set none."""
    if sum(options.get(name) is not None for name in _STRUCTURED) > 1:
        raise InvalidRequestError(f"only one of {', '.join(_STRUCTURED)} may be given", field="sampling.structured")
    choice = options.get("choice")
    if choice is not None and not choice:
        raise InvalidRequestError("choice: must have at least one text", field="sampling.structured.choice")


def _logprob_kind(processed: Any) -> Any:
    return pb.LOGPROB_KIND_PROCESSED if processed else pb.LOGPROB_KIND_RAW


_STRUCTURED = {
    "json_schema": "sampling.structured.json_schema",
    "json_object": "sampling.structured.json_object",
    "regex": "sampling.structured.regex",
    "choice": "sampling.structured.choice.texts",
    "grammar": "sampling.structured.grammar",
}
PATHS = {
    **_STRUCTURED,
    **{
        name: f"sampling.{name}"
        for name in (
            "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
            "logit_bias", "allowed_token_ids", "banned_token_ids", "seed",
        )
    },
    **{
        name: f"stop.{name}" for name in ("max_tokens", "min_tokens", "include_stop", "stop_token_ids", "ignore_eos")
    },
    "stop": "stop.stop_strings",
    "deadline": "stop.deadline_unix_ms",
    **{
        name: f"output.{name}" for name in ("logprobs", "prompt_logprobs", "text", "skip_special_tokens", "timings")
    },
    "processed_logprobs": "output.logprob_kind",
    **{name: name for name in ("n", "request_id", "model", "priority", "tenant", "cache_salt")},
    "queue_timeout": "queue_timeout_ms",
    "resume_window": "resume_window_ms",
}  # fmt: skip
_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {
    "stop": _texts,
    "json_schema": _json_text,
    "choice": _texts,
    "deadline": _milliseconds,
    "processed_logprobs": _logprob_kind,
    "queue_timeout": _milliseconds,
    "resume_window": _milliseconds,
}
