"""One inference: what was asked, and what the answers to it are."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scheduler_service.api.errors import invalid
from scheduler_service.api.open_inference.options import (
    Value,
    read_flag,
    read_json_object,
    read_options,
    read_text,
)
from scheduler_service.api.open_inference.tensors import BOOL, BYTES, FP32, INT32, PROMPT_IDS, UINT32, Tensor
from scheduler_service.api.output import Delta, TokenLogprobs
from scheduler_service.api.request import GenerationRequest, Prompt, TextPrompt, TokenPrompt

TEXT = "text_output"
_FINISH_REASON, _CUMULATIVE, _LOGPROBS = "finish_reason", "cumulative_logprob", "logprobs"
_INPUT_TOKENS, _OUTPUT_TOKENS = "num_input_tokens", "num_output_tokens"
# Name, datatype and shape of what clients learn of; options are further inputs.
INPUTS = (
    ("text_input", BYTES, (1,)),
    (PROMPT_IDS, INT32, (-1,)),
    ("stream", BOOL, (1,)),
    ("sampling_parameters", BYTES, (1,)),
    ("exclude_input_in_output", BOOL, (1,)),
    *(
        (f"return_{name}", BOOL, (1,))
        for name in (_FINISH_REASON, _CUMULATIVE, _LOGPROBS, _INPUT_TOKENS, _OUTPUT_TOKENS)
    ),
)
OUTPUTS = {
    TEXT: (BYTES, (-1,)),
    _FINISH_REASON: (BYTES, (-1,)),
    _CUMULATIVE: (FP32, (-1,)),
    _LOGPROBS: (BYTES, (-1,)),
    _INPUT_TOKENS: (UINT32, (1,)),
    _OUTPUT_TOKENS: (UINT32, (-1,)),
}
_ID_TYPES = ("INT32", "INT64", "UINT32")
_EMPTY_FINAL = "triton_enable_empty_final_response"


@dataclass(frozen=True, slots=True)
class Inference:
    """What was asked.

    Attributes:
        id: the caller's, for its answers; it need not be unique.
        request: what to generate.
        stream: whether pieces are wanted as they come.
        outputs: names of the tensors that are wanted.
        preamble: text in front of each sample's.
        raw: whether tensors travel in binary form.
        may_end_empty: whether the last answer may have no tensors.
    """

    id: str
    request: GenerationRequest
    stream: bool
    outputs: tuple[str, ...]
    preamble: str
    raw: bool
    may_end_empty: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """Tensors of one answer; ``final`` says that it is the last."""

    outputs: Sequence[Tensor]
    final: bool


def read_inference(
    call_id: str,
    model: str,
    tensors: Iterable[Tensor],
    parameters: Mapping[str, Value],
    outputs: Sequence[str],
    *,
    raw: bool,
) -> Inference:
    """An inference from the parts of its message.

    Raises:
        RequestError: INVALID_ARGUMENT, an input, a parameter or an output is unknown, given twice, or not of its type.
    """
    prompts: list[Prompt] = []
    values = dict(parameters)
    text = ""
    for tensor in tensors:
        if tensor.name == "text_input":
            text = read_text(list(tensor.elements), "text")
            prompts.append(TextPrompt(text))
        elif tensor.name == PROMPT_IDS:
            prompts.append(TokenPrompt(_ids(tensor)))
        else:
            _add(values, {tensor.name: list(tensor.elements)})
    if len(prompts) > 1:
        raise invalid("prompt", "only one of text_input and input_ids may be given")
    may_end_empty = _take_flag(values, _EMPTY_FINAL)
    streams = [_take_flag(values, name) for name in ("stream", "streaming")]
    stream = any(streams)
    without_input = _take_flag(values, "exclude_input_in_output", default=stream)
    if stream and not without_input:
        raise invalid("exclude_input_in_output", "must be true in a stream")
    flagged = [name for name in OUTPUTS if _take_flag(values, f"return_{name}")]
    wanted = tuple(dict.fromkeys((*(outputs or [TEXT]), *flagged)))
    if unknown := [name for name in wanted if name not in OUTPUTS]:
        raise invalid("outputs", f"there is no output {unknown[0][:64]!r}")
    if "sampling_parameters" in values:
        content = values.pop("sampling_parameters")
        _add(values, read_json_object(read_text(content, "sampling_parameters"), "sampling_parameters"))
    request = read_options(values, prompts[0] if prompts else None, model)
    if request.output.logprobs is None and {_LOGPROBS, _CUMULATIVE} & set(wanted):
        request = replace(request, output=replace(request.output, logprobs=0))
    return Inference(
        id=call_id,
        request=request,
        stream=stream,
        outputs=wanted,
        preamble="" if without_input else text,
        raw=raw,
        may_end_empty=may_end_empty,
    )


def _add(values: dict[str, Value], more: Mapping[str, Value]) -> None:
    for name, value in more.items():
        if name in values:
            raise invalid("parameters", f"{name[:64]!r} is given twice")
        values[name] = value


def _take_flag(values: dict[str, Value], name: str, *, default: bool = False) -> bool:
    return read_flag(values.pop(name), name) if name in values else default


def _ids(tensor: Tensor) -> list[int]:
    if tensor.datatype not in _ID_TYPES:
        raise invalid("token_ids", f"input_ids must be one of {', '.join(_ID_TYPES)}")
    ids = [int(element) for element in tensor.elements]
    if ids and min(ids) < 0:
        raise invalid("token_ids", "must not be negative")
    return ids


class Answers:
    """Makes answers out of what comes of an inference's samples."""

    def __init__(self, inference: Inference, prompt_tokens: int) -> None:
        self._inference = inference
        self._prompt_tokens = prompt_tokens
        self._cumulative = [0.0] * inference.request.n

    def piece(self, delta: Delta, *, final: bool) -> Answer:
        """What is new in one sample. The others have their places in the tensors, with nothing in them."""
        self._cumulative[delta.sample] += sum(one.logprob for one in delta.logprobs)
        outputs = self._inference.outputs
        if final and self._inference.may_end_empty and not delta.text and outputs == (TEXT,):
            return Answer((), final)
        news: list[Delta | None] = [None] * self._inference.request.n
        news[delta.sample] = delta
        return Answer([self._tensor(name, news) for name in outputs], final)

    def whole(self, samples: Sequence[Delta]) -> Answer:
        """The output of all samples."""
        self._cumulative = [sum(one.logprob for one in delta.logprobs) for delta in samples]
        prefaced = [replace(delta, text=self._inference.preamble + delta.text) for delta in samples]
        return Answer([self._tensor(name, prefaced) for name in self._inference.outputs], final=True)

    def _tensor(self, name: str, news: Sequence[Delta | None]) -> Tensor:
        elements: Sequence[str | int | float]
        match name:
            case "text_output":
                elements = ["" if one is None else one.text for one in news]
            case "finish_reason":
                elements = ["" if one is None or one.ending is None else one.ending.reason.value for one in news]
            case "cumulative_logprob":
                elements = list(self._cumulative)
            case "logprobs":
                elements = ["" if one is None else _logprobs_json(one.logprobs) for one in news]
            case "num_input_tokens":
                elements = [self._prompt_tokens]
            case _:
                elements = [0 if one is None else len(one.token_ids) for one in news]
        return Tensor(name, OUTPUTS[name][0], elements)


def _logprobs_json(logprobs: Sequence[TokenLogprobs]) -> str:
    """As vLLM's backend writes it: for each token an object from token ids, its own and the most likely ones."""
    return json.dumps([_alternatives(one) for one in logprobs])


def _alternatives(logprobs: TokenLogprobs) -> dict[int, dict[str, float | int | str]]:
    texts = logprobs.top_texts or [""] * len(logprobs.top_token_ids)
    top = zip(logprobs.top_token_ids, logprobs.top_logprobs, texts, strict=True)
    entries: dict[int, dict[str, float | int | str]] = {
        token_id: {"logprob": logprob, "rank": rank, "decoded_token": text}
        for rank, (token_id, logprob, text) in enumerate(top, start=1)
    }
    entries[logprobs.token_id] = {
        "logprob": logprobs.logprob,
        "rank": logprobs.rank,
        "decoded_token": logprobs.text,
    }
    return entries
