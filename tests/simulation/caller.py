"""A caller: the real SDK's resuming stream, read and compared token by token with what must come."""

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import numpy as np

from baton.endpoints import Endpoints
from baton.errors import (
    BatonError,
    ConnectFailedError,
    OverloadedError,
    RequestExistsError,
    RequestFailedError,
    UnavailableError,
)
from baton.resume import AsyncResumingCall
from baton.stream_log import ResumePolicy
from baton_protos import generation_pb2 as pb
from executor_service.step_plan import Int32s, RowSampling
from scheduler_service.api.seeds import sample_seed
from tests.fakes.shadow_executor import Expected, Logprob, answer
from tests.simulation.checks import require
from tests.simulation.clock import VirtualLoop
from tests.simulation.shadow import POISON_TOP_K, shadow_sampling
from tests.simulation.text import VOCAB, expected_text

_FINAL = {pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH}
_OUTCOMES: dict[type[BatonError], str] = {
    ConnectFailedError: "not been served",
    OverloadedError: "been turned away",
    RequestExistsError: "met itself",
    RequestFailedError: "failed",
    UnavailableError: "waited in vain",
}


class Host(Protocol):
    """Where callers live."""

    loop: VirtualLoop

    def note(self, who: str, what: str, *requests: str) -> None:
        """Something happened."""


@dataclass
class Habits:
    """How a caller behaves.

    Attributes:
        pause: seconds between two looks at the stream; 0 = reads at once.
        leaves_after: messages after which it walks away; 0 = stays to the end.
        comes_back: it does not walk away but crashes, and ``away`` seconds later asks again under the same name, from
            where it was.
    """

    pause: float = 0.0
    leaves_after: int = 0
    comes_back: bool = False
    away: float = 0.0
    patience: float = 30.0


@dataclass
class _Sample:
    """What has come of one sample."""

    expected: Expected
    count: int  # tokens that count; behind them there is a stop string
    text: str
    stop_string: str | None
    token_ids: list[int] = field(default_factory=list)
    received: str = ""
    is_flushed: bool = False  # has text that is given out only because the sample is cut short
    end: pb.StreamEnd | None = None


class Caller:
    """One request, from its sending to its end.

    Attributes:
        outcome: how it ended, in a word; empty while it goes on.
        last_news: when something came last.
    """

    def __init__(self, host: Host, name: str, request: pb.GenerateRequest, habits: Habits) -> None:
        self.name = name
        self.request = request
        self.habits = habits
        self.outcome = ""
        self.interruptions = 0
        self.last_news = host.loop.time()
        self.num_tokens = 0
        self._host = host
        self._samples: dict[int, _Sample] = {}
        self._seed: int | None = None
        self._has_begun = False
        self._num_messages = 0
        self._has_prompt_logprobs = False

    @property
    def is_poisonous(self) -> bool:
        return self.request.sampling.top_k == POISON_TOP_K

    async def run(self, endpoints: Endpoints) -> None:
        """Read the stream to its end, however it ends."""
        policy = ResumePolicy(patience=self.habits.patience)
        request = self.request
        while not self.outcome:
            call = AsyncResumingCall(endpoints, request, None, policy)
            try:
                await self._read(call)
            except BatonError as error:
                self._fail(error)
            finally:
                comes_back = self.outcome == "left" and self.habits.comes_back
                call._call.break_off() if comes_back else call.cancel()
                self.interruptions += call.interruptions
            if comes_back:
                await asyncio.sleep(self.habits.away)
                self.habits.leaves_after = 0
                self.outcome = ""
                request = self._continuation()
                self._host.note(self.name, "comes back", self.name)
        self._host.note(self.name, f"has {self.outcome} after {self.num_tokens} tokens", self.name)

    def _continuation(self) -> pb.GenerateRequest:
        """The same request from where it was left; ends come again."""
        request = pb.GenerateRequest()
        request.CopyFrom(self.request)
        if self._seed is not None:
            request.sampling.seed = self._seed
        for index, sample in self._samples.items():
            request.resume.add(sample=index, token_ids=sample.token_ids, text_offset=len(sample.received))
            sample.end = None
        self._has_begun = False
        return request

    async def _read(self, call: AsyncResumingCall) -> None:
        habits = self.habits
        while (response := await call.read()) is not grpc.aio.EOF:
            self.last_news = self._host.loop.time()
            self._num_messages += 1
            self._take(response)
            if habits.leaves_after and self._num_messages >= habits.leaves_after:
                self.outcome = "left"
                return
            if habits.pause:
                await asyncio.sleep(habits.pause)
        self._check_end()

    def _fail(self, error: BatonError) -> None:
        """Errors that may be; whether they may be now, the run decides."""
        require(type(error) in _OUTCOMES, f"{error!r}")
        require(not isinstance(error, RequestFailedError) or "executor died" in str(error), f"{error!r}")
        self.outcome = _OUTCOMES[type(error)]

    # ---------------------------------------------------------------- messages

    def _take(self, response: Any) -> None:
        match response.WhichOneof("event"):
            case "start":
                self._begin(response.start)
            case "chunk":
                self._take_chunk(response.chunk)
            case "prompt_logprobs":
                self._take_prompt_logprobs(response.prompt_logprobs)
            case "end":
                sample = self._samples[response.end.sample]
                require(sample.end is None, "a sample ends twice")
                sample.end = response.end
                self._check_sample(sample)

    def _begin(self, start: pb.StreamStart) -> None:
        require(not self._has_begun, "a stream begins twice")
        require(start.request_id == self.request.request_id, "another request's stream")
        require(self._seed in (None, start.seed), "a stream goes on under another seed")
        self._has_begun = True
        if self._seed is not None:
            return
        self._seed = start.seed
        prompt, stop = list(self.request.token_ids.ids), self.request.stop
        for index in range(self.request.n):
            sampling = shadow_sampling(self._row_sampling(sample_seed(start.seed, index)), len(prompt))
            expected = answer(prompt, stop.max_tokens, sampling, VOCAB)
            count, text, string = expected_text(
                expected.token_ids, stop.stop_strings, stop.min_tokens, include_stop=stop.include_stop
            )
            self._samples[index] = _Sample(expected, count, text, string)

    def _row_sampling(self, seed: int) -> RowSampling:
        sampling, output = self.request.sampling, self.request.output
        return RowSampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            seed=seed,
            banned_token_ids=_int32s(sampling.banned_token_ids),
            min_tokens=self.request.stop.min_tokens,
            stop_token_ids=_int32s(self.request.stop.stop_token_ids),
            num_logprobs=output.logprobs if output.HasField("logprobs") else None,
            num_prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        )

    def _take_chunk(self, chunk: pb.StreamChunk) -> None:
        sample = self._samples[chunk.sample]
        require(sample.end is None, "tokens behind the end")
        begin, end = len(sample.token_ids), len(sample.token_ids) + len(chunk.token_ids)
        require(chunk.token_index == begin, f"index {chunk.token_index} comes after {begin} tokens")
        require(end <= sample.count, "tokens behind a stop string")
        require(list(chunk.token_ids) == sample.expected.token_ids[begin:end], f"other tokens from {begin} on")
        require(chunk.text_offset == len(sample.received), "text is missing, or comes twice")
        require(not chunk.best_effort_continuation, "a stream is called inexact")
        sample.token_ids += chunk.token_ids
        sample.received += chunk.text
        require(not sample.is_flushed, f"text {sample.received!r}, expected {sample.text!r}")
        sample.is_flushed = not sample.text.startswith(sample.received)
        if self.request.output.HasField("logprobs"):
            expected = sample.expected.logprobs[begin:end]
            require([_logprob(one) for one in chunk.logprobs] == expected, "other log probabilities")
        self.num_tokens += len(chunk.token_ids)

    def _take_prompt_logprobs(self, message: pb.StreamPromptLogprobs) -> None:
        require(not self._has_prompt_logprobs or self.habits.comes_back, "the prompt's log probabilities come twice")
        self._has_prompt_logprobs = True
        expected = self._samples[0].expected.prompt_logprobs
        require([_logprob(one) for one in message.logprobs] == expected, "other log probabilities of the prompt")

    # ---------------------------------------------------------------- the end

    def _check_sample(self, sample: _Sample) -> None:
        end = sample.end
        assert end is not None
        require(end.usage.completion_tokens == len(sample.token_ids), "usage counts other tokens than came")
        require(end.usage.prompt_tokens == len(self.request.token_ids.ids), "usage counts another prompt")
        require(end.usage.cached_tokens <= end.usage.prompt_tokens, "usage counts too many cached tokens")
        if end.finish_reason not in _FINAL:
            is_late = end.finish_reason == pb.FINISH_REASON_DEADLINE and self.request.stop.deadline_unix_ms
            require(is_late, "an abort that nobody asked for")
            return
        require(len(sample.token_ids) == sample.count, f"{len(sample.token_ids)} tokens instead of {sample.count}")
        require(sample.received == sample.text, f"text {sample.received!r} instead of {sample.text!r}")
        stops = sample.stop_string is not None or sample.expected.stops
        require((end.finish_reason == pb.FINISH_REASON_STOP) == stops, "another reason for its end")
        require(end.stop_string == (sample.stop_string or ""), "another stop string")
        has_id = sample.stop_string is None and sample.expected.stops
        require(end.HasField("stop_token_id") == has_id, "a stop id that was none, or none that was")

    def _check_end(self) -> None:
        require(self._seed is not None, "a stream without a beginning")
        require(all(one.end is not None for one in self._samples.values()), "a stream without an end")
        reasons = {one.end.finish_reason for one in self._samples.values() if one.end is not None}
        self.outcome = "finished" if reasons <= _FINAL else "been cut short"
        wants_prompt = self.outcome == "finished" and len(self._samples[0].expected.prompt_logprobs) > 0
        require(self._has_prompt_logprobs or not wants_prompt, "the prompt's log probabilities never came")


def _int32s(values: Any) -> Int32s:
    return np.array(list(values), np.int32)


def _logprob(one: pb.TokenLogprobs) -> Logprob:
    return Logprob(one.logprob, one.rank, tuple(zip(one.top_token_ids, one.top_logprobs, strict=True)))


def random_request(rng: random.Random, name: str, most_tokens: int) -> pb.GenerateRequest:
    """A request whose prompt and output have at most ``most_tokens`` tokens."""
    family = rng.randint(0, 2)
    prompt = [(family * 31 + i * 7) % VOCAB for i in range(rng.randint(0, 24))]
    prompt += [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
    prompt = prompt[-(most_tokens - 1) :]
    max_tokens = rng.randint(1, min(most_tokens - len(prompt), 40))
    request = pb.GenerateRequest(
        request_id=name,
        n=rng.choice([1, 1, 1, 2, 3]),
        priority=rng.choice([0, 0, 0, -1, 1]),
        tenant=rng.choice(["", "", "tenant"]),
        cache_salt=rng.choice(["", "", "", "salt"]),
        stop=pb.StopConditions(
            max_tokens=max_tokens,
            min_tokens=min(rng.choice([0, 0, 0, 5]), max_tokens),
            stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 0, 1, 3])),
            stop_strings=rng.choice([(), (), (), ("abab", "c ab"), ("é",), ("aba", "bab", "x\n")]),
            include_stop=rng.random() < 0.3,
        ),
        output=pb.OutputOptions(
            prompt_token_ids=rng.random() < 0.5,
            timings=rng.random() < 0.2,
            logprobs=rng.choice([None, None, None, 0, 2]),
        ),
    )
    request.token_ids.ids[:] = prompt
    sampling = request.sampling
    sampling.temperature, sampling.top_p = rng.choice([0.0, 1.0]), rng.choice([1.0, 0.5])
    if rng.random() < 0.8:
        sampling.seed = rng.getrandbits(63)
    if rng.random() < 0.2:
        sampling.presence_penalty = 0.5
    if rng.random() < 0.2:
        sampling.repetition_penalty = 1.25
    if rng.random() < 0.1:
        sampling.banned_token_ids[:] = rng.sample(range(VOCAB), 3)
    if rng.random() < 0.1:
        request.output.prompt_logprobs = rng.randint(0, 2)
    return request
