"""Requests for tests, and streams read with all their positions checked."""

from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import Any

from baton_protos import generation_pb2 as pb


@dataclass
class SampleRead:
    """What came of one sample; ``end`` is None if the stream broke off."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    chunks: int = 0
    end: pb.StreamEnd | None = None

    @property
    def ended(self) -> pb.StreamEnd:
        assert self.end is not None
        return self.end


@dataclass
class StreamRead:
    start: pb.StreamStart
    samples: list[SampleRead]
    prompt_logprobs: list[pb.TokenLogprobs] = field(default_factory=list)

    @property
    def only(self) -> SampleRead:
        (sample,) = self.samples
        return sample

    def points(self) -> list[pb.ResumePoint]:
        """What a caller sends to go on from here."""
        return [
            pb.ResumePoint(sample=index, token_ids=sample.token_ids, text_offset=len(sample.text))
            for index, sample in enumerate(self.samples)
        ]


async def read(
    call: AsyncIterable[pb.GenerateStreamResponse], points: tuple[pb.ResumePoint, ...] = (), limit: int | None = None
) -> StreamRead:
    """Read a stream, or its first ``limit`` messages; ``points`` are what the caller had before.

    What it had is not in the result, and is where positions have to begin.
    """
    stream: StreamRead | None = None
    had = {point.sample: point for point in points}
    count = 0
    async for message in call:
        event = message.WhichOneof("event")
        if stream is None:
            assert event == "start"
            stream = StreamRead(message.start, [SampleRead() for _ in message.start.sample_seeds])
        elif event == "prompt_logprobs":
            assert not stream.prompt_logprobs
            stream.prompt_logprobs = list(message.prompt_logprobs.logprobs)
        elif event == "chunk":
            chunk = message.chunk
            sample = stream.samples[chunk.sample]
            point = had.get(chunk.sample, pb.ResumePoint())
            assert sample.end is None
            assert chunk.token_ids or chunk.text
            assert chunk.token_index == len(point.token_ids) + len(sample.token_ids)
            assert chunk.text_offset == point.text_offset + len(sample.text)
            assert chunk.chunk_index == sample.chunks
            sample.chunks += 1
            sample.token_ids += chunk.token_ids
            sample.text += chunk.text
            sample.logprobs += chunk.logprobs
        else:
            assert event == "end"
            sample = stream.samples[message.end.sample]
            assert sample.end is None
            sample.end = message.end
        count += 1
        if count == limit:
            break
    assert stream is not None
    assert limit is not None or all(sample.end is not None for sample in stream.samples)
    return stream


def ask(
    text: str = "def add(a, b):",
    max_tokens: int | None = 20,
    seed: int | None = 7,
    stop: dict[str, Any] | None = None,
    **fields: Any,
) -> pb.GenerateRequest:
    """A request that goes on to ``max_tokens`` unless ``stop`` says otherwise."""
    conditions = pb.StopConditions(**{"max_tokens": max_tokens, "ignore_eos": True, **(stop or {})})
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(seed=seed), stop=conditions, **fields)


def resumed(request: pb.GenerateRequest, start: pb.StreamStart, *points: pb.ResumePoint) -> pb.GenerateRequest:
    """``request`` as it is sent to go on from ``points``: with the seed and the prompt that the stream began with."""
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    again.token_ids.ids[:] = start.prompt_token_ids
    again.sampling.seed = start.seed
    again.resume.extend(points)
    return again
