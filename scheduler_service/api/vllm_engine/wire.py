"""vllm_engine.proto <-> plain values.

Its scalars are plain where vLLM's defaults are not zero, and its callers set them all; one that is zero nevertheless
was left out, and means vLLM's default.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2

from scheduler_service.api.checkpoint import Checkpoint
from scheduler_service.api.errors import RequestError
from scheduler_service.api.messages import EngineLimits
from scheduler_service.api.output import Delta, Ending, TokenLogprobs
from scheduler_service.api.request import (
    GenerationRequest,
    OutputOptions,
    Prompt,
    Sampling,
    StopConditions,
    StructuredKind,
    StructuredOutput,
    TextPrompt,
    TokenPrompt,
)
from scheduler_service.api.rules import RequestLimits, few
from scheduler_service.api.wire import ClusterStatus

_STRUCTURED = {
    "json_schema": StructuredKind.JSON_SCHEMA,
    "regex": StructuredKind.REGEX,
    "grammar": StructuredKind.GRAMMAR,
}
_UNSUPPORTED = {"mm_inputs", "extra_mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json"}
_SEED_MASK = (1 << 64) - 1


def decode_request(message: vllm_engine_pb2.GenerateRequest) -> GenerationRequest:
    """A Generate request, with vLLM's defaults filled in.

    Raises:
        RequestError: UNIMPLEMENTED, it asks for what Baton does not do; INVALID_ARGUMENT, it has too many of something.
    """
    for field, _ in message.ListFields():
        if field.name in _UNSUPPORTED:
            raise _unsupported(field.name)
    if message.data_parallel_rank:
        raise _unsupported("data_parallel_rank")
    params = message.sampling_params
    return GenerationRequest(
        prompt=_decode_prompt(message),
        request_id=message.request_id,
        sampling=_decode_sampling(params),
        stop=StopConditions(
            max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
            stop_token_ids=tuple(few("stop.stop_token_ids", params.stop_token_ids, RequestLimits.max_listed_token_ids)),
            ignore_eos=params.ignore_eos,
            stop_strings=tuple(few("stop.stop_strings", params.stop, RequestLimits.max_stop_strings)),
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        ),
        output=OutputOptions(
            text=False,
            prompt_token_ids=False,
            skip_special_tokens=params.skip_special_tokens,
            logprobs=params.logprobs if params.HasField("logprobs") else None,
            prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        ),
        n=params.n or 1,
    )


def _decode_prompt(message: vllm_engine_pb2.GenerateRequest) -> Prompt | None:
    match message.WhichOneof("input"):
        case "tokenized":
            return TokenPrompt(message.tokenized.input_ids)
        case "text":
            return TextPrompt(message.text)
        case _:
            return None


def _decode_sampling(params: vllm_engine_pb2.SamplingParams) -> Sampling:
    if params.HasField("truncate_prompt_tokens"):
        raise _unsupported("sampling_params.truncate_prompt_tokens")
    return Sampling(
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_k=params.top_k,
        top_p=params.top_p or 1.0,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty or 1.0,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=params.seed & _SEED_MASK if params.HasField("seed") else None,
        logit_bias=dict(few("sampling.logit_bias", params.logit_bias, RequestLimits.max_biased_token_ids)),
        structured=_decode_structured(params),
    )


def _decode_structured(params: vllm_engine_pb2.SamplingParams) -> StructuredOutput | None:
    match params.WhichOneof("constraint"):
        case None:
            return None
        case "json_object":
            return StructuredOutput(StructuredKind.JSON_OBJECT) if params.json_object else None
        case "choice":
            choices = few("sampling.structured.choice", params.choice.choices, RequestLimits.max_choices)
            return StructuredOutput(StructuredKind.CHOICE, tuple(choices))
        case "structural_tag":
            raise _unsupported("sampling_params.structural_tag")
        case kind:
            return StructuredOutput(_STRUCTURED[kind], (getattr(params, kind),))


def _unsupported(field: str) -> RequestError:
    return RequestError(grpc.StatusCode.UNIMPLEMENTED, field, "is not supported here")


def encode_delta(
    delta: Delta, prompt_token_ids: Sequence[int], prompt_tokens: int
) -> list[vllm_engine_pb2.GenerateResponse]:
    """A stream's messages for what is new in a sample; the end repeats nothing of what came before it.

    ``prompt_token_ids`` are only needed with log probabilities of the prompt.
    """
    messages = []
    if delta.token_ids or delta.prompt_logprobs is not None:
        chunk = vllm_engine_pb2.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(delta.token_ids),
            cached_tokens=0 if delta.ending is None else delta.ending.usage.cached_tokens,
            output_logprobs=_output_logprobs(delta.logprobs),
            input_logprobs=_input_logprobs(delta, prompt_token_ids),
            index=delta.sample,
        )
        messages.append(vllm_engine_pb2.GenerateResponse(chunk=chunk))
    if delta.ending is not None:
        complete = _complete(delta.sample, delta.ending)
        messages.append(vllm_engine_pb2.GenerateResponse(complete=complete))
    return messages


def encode_whole(delta: Delta, ending: Ending, prompt_token_ids: Sequence[int]) -> vllm_engine_pb2.GenerateResponse:
    """The one message of a sample that is not streamed."""
    complete = _complete(delta.sample, ending)
    complete.output_ids.extend(delta.token_ids)
    if delta.logprobs:
        complete.output_logprobs.CopyFrom(_output_logprobs(delta.logprobs))
    if delta.prompt_logprobs is not None:
        complete.input_logprobs.CopyFrom(_input_logprobs(delta, prompt_token_ids))
    return vllm_engine_pb2.GenerateResponse(complete=complete)


def _complete(sample: int, ending: Ending) -> vllm_engine_pb2.GenerateComplete:
    return vllm_engine_pb2.GenerateComplete(
        finish_reason=ending.reason.value,
        prompt_tokens=ending.usage.prompt_tokens,
        completion_tokens=ending.usage.completion_tokens,
        cached_tokens=ending.usage.cached_tokens,
        index=sample,
        matched_token_id=ending.stop_token_id,
        matched_stop_str=ending.stop_string,
    )


def _output_logprobs(logprobs: Sequence[TokenLogprobs]) -> vllm_engine_pb2.OutputLogProbs | None:
    if not logprobs:
        return None
    return vllm_engine_pb2.OutputLogProbs(
        token_logprobs=[one.logprob for one in logprobs],
        token_ids=[one.token_id for one in logprobs],
        top_logprobs=map(_top_logprobs, logprobs),
    )


def _input_logprobs(delta: Delta, prompt_token_ids: Sequence[int]) -> vllm_engine_pb2.InputLogProbs | None:
    if delta.prompt_logprobs is None:
        return None
    # The first token has none: an empty entry keeps its place.
    values = [vllm_engine_pb2.InputTokenLogProb(value=one.logprob) for one in delta.prompt_logprobs]
    return vllm_engine_pb2.InputLogProbs(
        token_logprobs=[vllm_engine_pb2.InputTokenLogProb(), *values],
        token_ids=prompt_token_ids,
        top_logprobs=[vllm_engine_pb2.TopLogProbs(), *map(_top_logprobs, delta.prompt_logprobs)],
    )


def _top_logprobs(logprobs: TokenLogprobs) -> vllm_engine_pb2.TopLogProbs:
    return vllm_engine_pb2.TopLogProbs(values=logprobs.top_logprobs, token_ids=logprobs.top_token_ids)


def encode_model_info(
    checkpoint: Checkpoint, folder: Path, name: str, limits: EngineLimits
) -> vllm_engine_pb2.GetModelInfoResponse:
    """What a gateway registers: its own checks of length and vocabulary go by it."""
    return vllm_engine_pb2.GetModelInfoResponse(
        model_path=str(folder),
        is_generation=True,
        max_context_length=limits.max_total_tokens,
        vocab_size=limits.vocab_size or checkpoint.vocab_size,
        served_model_name=name,
        tokenizer_path=str(folder),
        architectures=checkpoint.architectures,
        eos_token_ids=checkpoint.eos_token_ids,
        max_req_input_len=max(0, limits.max_total_tokens - 1),
    )


def encode_loads(status: ClusterStatus) -> vllm_engine_pb2.GetLoadsResponse:
    """The load of all executors together: callers see one engine."""
    cluster = status.response
    executors = cluster.executors
    running = sum(one.running_requests for one in executors)
    waiting = cluster.queued_requests + sum(one.waiting_requests for one in executors)
    used = sum(one.used_blocks * one.block_size for one in executors)
    total = sum(one.total_blocks * one.block_size for one in executors)
    queried = sum(one.prefix_query_tokens for one in executors)
    usage = used / total if total else 0.0
    load = vllm_engine_pb2.SchedulerLoad(
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_total_reqs=running + waiting,
        num_used_tokens=used,
        max_total_num_tokens=total,
        token_usage=usage,
        cache_hit_rate=sum(one.prefix_hit_tokens for one in executors) / queried if queried else 0.0,
        utilization=usage,
        max_running_requests=sum(one.max_rows for one in executors),
    )
    return vllm_engine_pb2.GetLoadsResponse(timestamp=datetime.now(UTC).isoformat(), dp_rank_count=1, loads=[load])


def encode_tokenizer(archive: bytes, digest: str, chunk_bytes: int) -> Iterator[common_pb2.GetTokenizerChunk]:
    """The archive in chunks; the last one has its digest."""
    for start in range(0, len(archive), chunk_bytes):
        end = start + chunk_bytes
        yield common_pb2.GetTokenizerChunk(data=archive[start:end], sha256=digest if end >= len(archive) else "")
