"""Requests that break one limit each, with the field that is to blame. Every entry must refuse all of them."""

from collections.abc import Sequence
from typing import Any

from baton_protos import generation_pb2 as pb

NAN, INF = float("nan"), float("inf")


def ids(*token_ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=token_ids)


def chat(*messages: tuple[str, str]) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])


def request(**fields: Any) -> pb.GenerateRequest:
    if not fields.keys() & {"text", "token_ids", "chat", "prompt"}:
        fields["token_ids"] = ids(5, 6, 7)
    fields.pop("prompt", None)
    return pb.GenerateRequest(**fields)


def sampling(**fields: Any) -> pb.GenerateRequest:
    return request(sampling=pb.SamplingParams(**fields))


def stop(**fields: Any) -> pb.GenerateRequest:
    return request(stop=pb.StopConditions(**fields))


def output(**fields: Any) -> pb.GenerateRequest:
    return request(output=pb.OutputOptions(**fields))


def resume(*points: tuple[int, Sequence[int], int], seed: int | None = 1, **fields: Any) -> pb.GenerateRequest:
    made = [pb.ResumePoint(sample=sample, token_ids=token_ids, text_offset=at) for sample, token_ids, at in points]
    return request(resume=made, sampling=pb.SamplingParams(seed=seed), **fields)


# The served model has 512 ids, ends at ids 2 and 0, and takes 1000 tokens in all.
VIOLATIONS: dict[str, tuple[pb.GenerateRequest, str]] = {
    "no prompt": (request(prompt=None), "prompt"),
    "empty text": (request(text=""), "text"),
    "5 MB of text": (request(text="the quick brown fox " * 250_000), "text"),
    "5 MB of two-byte text": (request(text="é" * 2_500_000), "text"),
    "text longer than the context": (request(text="x y " * 1000), "text"),
    "no ids": (request(token_ids=ids()), "token_ids"),
    "ids out of the vocabulary": (request(token_ids=ids(5, 512)), "token_ids"),
    "huge ids": (request(token_ids=ids(2**32 - 1)), "token_ids"),
    "ids that fill the context": (request(token_ids=ids(*[5] * 1000)), "token_ids"),
    "very many ids": (request(token_ids=ids(*[5] * 1_000_000)), "token_ids"),
    "no messages": (request(chat=chat()), "chat"),
    "too many messages": (request(chat=chat(*[("user", "")] * 5000)), "chat"),
    "no role": (request(chat=chat(("", "hi"))), "chat"),
    "long role": (request(chat=chat(("x" * 65, "hi"))), "chat"),
    "5 MB of chat": (request(chat=chat(("user", "x" * 2_500_000), ("user", "x" * 2_500_000))), "chat"),
    "long request id": (request(request_id="x" * 129), "request_id"),
    "unprintable request id": (request(request_id="a\nb"), "request_id"),
    "a resume window without a name": (request(resume_window_ms=1000), "request_id"),
    "long resume window": (request(resume_window_ms=600_001, request_id="a"), "resume_window_ms"),
    "long queue timeout": (request(queue_timeout_ms=2**32 - 1), "queue_timeout_ms"),
    "long tenant": (request(tenant="x" * 129), "tenant"),
    "unprintable tenant": (request(tenant="a\0b"), "tenant"),
    "long cache salt": (request(cache_salt="x" * 129), "cache_salt"),
    "n 0": (request(n=0), "n"),
    "n 65": (request(n=65), "n"),
    "n 2^32 - 1": (request(n=2**32 - 1), "n"),
    "priority 1001": (request(priority=1001), "priority"),
    "priority -1001": (request(priority=-1001), "priority"),
    "temperature -1": (sampling(temperature=-1), "sampling.temperature"),
    "temperature 0.00009": (sampling(temperature=0.00009), "sampling.temperature"),
    "temperature 1e-38": (sampling(temperature=1e-38), "sampling.temperature"),
    "temperature 101": (sampling(temperature=101), "sampling.temperature"),
    "temperature NaN": (sampling(temperature=NAN), "sampling.temperature"),
    "temperature inf": (sampling(temperature=INF), "sampling.temperature"),
    "top_p 0": (sampling(top_p=0), "sampling.top_p"),
    "top_p that is 0 in 32 bits": (sampling(top_p=1e-42), "sampling.top_p"),
    "top_p 2": (sampling(top_p=2), "sampling.top_p"),
    "top_p NaN": (sampling(top_p=NAN), "sampling.top_p"),
    "top_p -inf": (sampling(top_p=-INF), "sampling.top_p"),
    "top_k above the vocabulary": (sampling(top_k=513), "sampling.top_k"),
    "min_p -0.5": (sampling(min_p=-0.5), "sampling.min_p"),
    "min_p 1.5": (sampling(min_p=1.5), "sampling.min_p"),
    "min_p NaN": (sampling(min_p=NAN), "sampling.min_p"),
    "repetition_penalty 0": (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    "repetition_penalty 0.009": (sampling(repetition_penalty=0.009), "sampling.repetition_penalty"),
    "repetition_penalty 1e-38": (sampling(repetition_penalty=1e-38), "sampling.repetition_penalty"),
    "repetition_penalty 10.5": (sampling(repetition_penalty=10.5), "sampling.repetition_penalty"),
    "repetition_penalty NaN": (sampling(repetition_penalty=NAN), "sampling.repetition_penalty"),
    "frequency_penalty 2.5": (sampling(frequency_penalty=2.5), "sampling.frequency_penalty"),
    "frequency_penalty NaN": (sampling(frequency_penalty=NAN), "sampling.frequency_penalty"),
    "presence_penalty -2.5": (sampling(presence_penalty=-2.5), "sampling.presence_penalty"),
    "presence_penalty inf": (sampling(presence_penalty=INF), "sampling.presence_penalty"),
    "too many biases": (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling.logit_bias"),
    "bias of no id": (sampling(logit_bias={512: 1.0}), "sampling.logit_bias"),
    "bias 101": (sampling(logit_bias={5: 101.0}), "sampling.logit_bias"),
    "bias NaN": (sampling(logit_bias={5: NAN}), "sampling.logit_bias"),
    "too many allowed ids": (sampling(allowed_token_ids=[5] * 16_385), "sampling.allowed_token_ids"),
    "allowed ids out of the vocabulary": (sampling(allowed_token_ids=[512]), "sampling.allowed_token_ids"),
    "too many banned ids": (sampling(banned_token_ids=[5] * 16_385), "sampling.banned_token_ids"),
    "banned ids out of the vocabulary": (sampling(banned_token_ids=[512]), "sampling.banned_token_ids"),
    "everything banned": (sampling(banned_token_ids=range(512)), "sampling.banned_token_ids"),
    "all that is allowed banned": (
        sampling(allowed_token_ids=[5, 6], banned_token_ids=[6, 5]),
        "sampling.banned_token_ids",
    ),
    "no kind of structured output": (sampling(structured=pb.StructuredOutput()), "sampling.structured"),
    "empty regex": (sampling(structured=pb.StructuredOutput(regex="")), "sampling.structured.regex"),
    "max_tokens 0": (stop(max_tokens=0), "stop.max_tokens"),
    "more than fits": (stop(max_tokens=998), "stop.max_tokens"),
    "huge max_tokens": (stop(max_tokens=2**32 - 1), "stop.max_tokens"),
    "stop id out of the vocabulary": (stop(stop_token_ids=[512]), "stop.stop_token_ids"),
    "too many stop ids": (stop(stop_token_ids=range(10, 25)), "stop.stop_token_ids"),
    "too many stop strings": (stop(stop_strings=["x"] * 17), "stop.stop_strings"),
    "empty stop string": (stop(stop_strings=["x", ""]), "stop.stop_strings"),
    "long stop string": (stop(stop_strings=["é" * 257]), "stop.stop_strings"),
    "min_tokens above max_tokens": (stop(max_tokens=3, min_tokens=4), "stop.min_tokens"),
    "min_tokens above what fits": (stop(min_tokens=998), "stop.min_tokens"),
    "nothing but stop ids before min_tokens": (
        request(sampling=pb.SamplingParams(allowed_token_ids=[0, 2]), stop=pb.StopConditions(min_tokens=1)),
        "stop.min_tokens",
    ),
    "21 log probabilities": (output(logprobs=21), "output.logprobs"),
    "21 of the prompt": (output(prompt_logprobs=21), "output.prompt_logprobs"),
    "unknown kind of log probabilities": (output(logprob_kind=7), "output.logprob_kind"),  # type: ignore[arg-type]
    "a point for no sample": (resume((1, [5], 0)), "resume"),
    "two points for a sample": (resume((0, [5], 0), (0, [5], 0)), "resume"),
    "point with ids out of the vocabulary": (resume((0, [512], 0)), "resume"),
    "point without a seed": (resume((0, [5], 0), seed=None), "sampling.seed"),
    "point behind max_tokens": (resume((0, [5, 6, 7], 0), stop=pb.StopConditions(max_tokens=2)), "resume"),
    "point behind the end of the sequence": (resume((0, [5, 2, 7], 0)), "resume"),
    "point behind its own text": (resume((0, [40, 41], 1000)), "resume"),
}
# What no caller can send wrong: neither their type nor anything else allows a bad value.
HARMLESS = {
    "model",  # NOT_FOUND, see its own test
    "sampling.seed",
    "stop.ignore_eos",
    "stop.include_stop",
    "stop.deadline_unix_ms",
    "output.text",  # FAILED_PRECONDITION without a tokenizer, see its own test
    "output.prompt_token_ids",
    "output.skip_special_tokens",
    "output.timings",
}
