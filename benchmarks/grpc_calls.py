"""Requests over bare gRPC stubs, at the least cost to the machine that is being measured.

Answers are kept as bytes with the time of their arrival and looked into afterwards.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from baton.channel import SERVICE, channel_options
from baton_protos import generation_pb2 as pb
from benchmarks.figures import percentile
from benchmarks.workloads import Request


class WrongAnswerError(Exception):
    """An answer does not have what was asked for."""


@dataclass(slots=True)
class Answer:
    """Times are seconds since the request was sent. ``arrivals``: when tokens came, and how many."""

    num_tokens: int
    cached_tokens: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Milliseconds over all tokens of all requests. A message of k tokens counts as k equal gaps."""

    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None


def encode_request(request: Request, *, text: bool = False) -> bytes:
    """Greedy, to the last token, no echo of the prompt."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=request.prompt),
        sampling=pb.SamplingParams(temperature=0.0),
        stop=pb.StopConditions(max_tokens=request.max_tokens, ignore_eos=True),
        output=pb.OutputOptions(text=text, prompt_token_ids=False),
    ).SerializeToString()


def connect(address: str) -> grpc.aio.Channel:
    """A connection of its own."""
    return grpc.aio.insecure_channel(address, options=channel_options())


async def generate_all(channel: grpc.aio.Channel, requests: Sequence[Request]) -> list[Answer]:
    """Run requests together, one answer each at its end."""
    call = channel.unary_unary(f"/{SERVICE}/Generate")
    raw = await asyncio.gather(*(call(encode_request(request)) for request in requests))
    answers = []
    for request, response in zip(requests, map(pb.GenerateResponse.FromString, raw), strict=True):
        num_tokens = len(response.samples[0].token_ids)
        _check(request, response.usage, num_tokens)
        answers.append(Answer(num_tokens, response.usage.cached_tokens))
    return answers


async def stream_all(channel: grpc.aio.Channel, requests: Sequence[Request]) -> list[Answer]:
    """Run requests together, streamed."""
    streams = await asyncio.gather(*(_stream(channel, encode_request(request)) for request in requests))
    return [_fold(request, messages) for request, messages in zip(requests, streams, strict=True)]


def latencies(answers: Sequence[Answer]) -> Latencies:
    """Of streamed answers; nothing but None for others."""
    first = [answer.arrivals[0][0] * 1e3 for answer in answers if answer.arrivals]
    gaps = [gap for answer in answers for gap in gaps_ms(answer.arrivals)]
    return Latencies(percentile(first, 50), percentile(first, 99), percentile(gaps, 50), percentile(gaps, 99))


def gaps_ms(arrivals: Sequence[tuple[float, int]]) -> list[float]:
    """Milliseconds before each token but those of the first message."""
    gaps: list[float] = []
    for (before, _), (now, count) in itertools.pairwise(arrivals):
        gaps += [(now - before) * 1e3 / count] * count
    return gaps


async def _stream(channel: grpc.aio.Channel, request: bytes) -> list[tuple[float, bytes]]:
    began = time.perf_counter()
    call = channel.unary_stream(f"/{SERVICE}/GenerateStream")(request)
    messages: list[tuple[float, bytes]] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append((time.perf_counter() - began, message))
    return messages


def _fold(request: Request, messages: Sequence[tuple[float, bytes]]) -> Answer:
    answer = Answer(0, 0)
    end = pb.StreamEnd()
    for moment, event in ((moment, pb.GenerateStreamResponse.FromString(data)) for moment, data in messages):
        if event.HasField("chunk"):
            if event.chunk.token_index != answer.num_tokens:
                raise WrongAnswerError(f"token {event.chunk.token_index} came where {answer.num_tokens} was due")
            answer.arrivals.append((moment, len(event.chunk.token_ids)))
            answer.num_tokens += len(event.chunk.token_ids)
        elif event.HasField("end"):
            end = event.end
    _check(request, end.usage, answer.num_tokens)
    answer.cached_tokens = end.usage.cached_tokens
    return answer


def _check(request: Request, usage: pb.Usage, num_tokens: int) -> None:
    if not num_tokens == usage.completion_tokens == request.max_tokens or usage.prompt_tokens != len(request.prompt):
        raise WrongAnswerError(
            f"{len(request.prompt)} tokens in and {request.max_tokens} out were asked for, "
            f"usage says {usage.prompt_tokens} and {usage.completion_tokens}, {num_tokens} came"
        )
