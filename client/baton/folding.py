"""Folds the messages of one stream into deltas and, at its end, a completion."""

from baton import messages
from baton.errors import ProtocolError
from baton.values import Completion, Delta, Sample, TokenLogprobs, Usage
from baton_protos import generation_pb2 as pb


class StreamFolder:
    """Checks and accumulates one stream.

    Tokens and text carry absolute positions: what came before is dropped, a hole is an error. So a stream that was
    taken up again elsewhere cannot repeat or lose anything unnoticed.
    """

    def __init__(self) -> None:
        self._start: pb.StreamStart | None = None
        self._samples: list[_SampleFolder] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._completion: Completion | None = None

    @property
    def request_id(self) -> str:
        """The request's id; empty until the stream's first message was added."""
        return self._start.request_id if self._start is not None else ""

    @property
    def completion(self) -> Completion | None:
        """The finished request; None until the last message of every sample was added."""
        return self._completion

    def add(self, response: pb.GenerateStreamResponse) -> Delta | None:
        """Adds the next message and returns what is new in it, if anything.

        Raises:
            ProtocolError: the message does not continue the stream.
        """
        if self._completion is not None:
            raise ProtocolError("the stream went on after its last message")
        event = response.WhichOneof("event")
        if event == "start" and self._start is None:
            self._start = response.start
            seeds = response.start.sample_seeds or [response.start.seed]
            self._samples = [_SampleFolder(index, seed) for index, seed in enumerate(seeds)]
            return None
        if self._start is None:
            raise ProtocolError(f"the stream began with {event or 'an empty message'}")
        match event:
            case "chunk":
                return self._sample(response.chunk.sample).add(response.chunk)
            case "end":
                self._sample(response.end.sample).finish(response.end)
                if all(sample.usage is not None for sample in self._samples):
                    self._completion = self._finish(self._start)
            case "prompt_logprobs":
                self._prompt_logprobs = messages.logprobs(response.prompt_logprobs.logprobs)
            case _:
                raise ProtocolError(f"unexpected {event or 'empty message'} in the stream")
        return None

    def finished(self) -> Completion:
        """The completion, once the transport says that the stream is over.

        Raises:
            ProtocolError: it ended without its last message.
        """
        if self._completion is None:
            raise ProtocolError("the stream ended without its last message")
        return self._completion

    def _sample(self, index: int) -> "_SampleFolder":
        if index >= len(self._samples):
            raise ProtocolError(f"{len(self._samples)} samples were asked for, sample {index} came")
        return self._samples[index]

    def _finish(self, start: pb.StreamStart) -> Completion:
        usages = [sample.usage for sample in self._samples if sample.usage is not None]
        return Completion(
            samples=tuple(sample.value() for sample in self._samples),
            usage=Usage(
                prompt_tokens=usages[0].prompt_tokens,
                # The other samples find in the cache what the first has just put there.
                cached_tokens=min(usage.cached_tokens for usage in usages),
                completion_tokens=sum(usage.completion_tokens for usage in usages),
            ),
            prompt_token_ids=tuple(start.prompt_token_ids),
            seed=start.seed,
            request_id=start.request_id,
            model_fingerprint=start.model_fingerprint,
            prompt_logprobs=self._prompt_logprobs,
            exact=all(sample.is_exact for sample in self._samples),
        )


class _SampleFolder:
    """One sample; ``usage`` is None until its last message was added."""

    def __init__(self, index: int, seed: int) -> None:
        self.usage: Usage | None = None
        self._index = index
        self._seed = seed
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._text_length = 0
        self._logprobs: list[TokenLogprobs] = []
        self._end = pb.StreamEnd()
        self.is_exact = True

    def add(self, chunk: pb.StreamChunk) -> Delta | None:
        if self.usage is not None:
            raise ProtocolError(f"sample {self._index} went on after its last message")
        if chunk.logprobs and len(chunk.logprobs) != len(chunk.token_ids):
            raise ProtocolError(f"{len(chunk.logprobs)} log probabilities came for {len(chunk.token_ids)} tokens")
        self.is_exact &= not chunk.best_effort_continuation
        index, offset = len(self._token_ids), self._text_length
        known = _known("token", len(chunk.token_ids), chunk.token_index, index)
        token_ids = chunk.token_ids[known:]
        text = chunk.text[_known("text", len(chunk.text), chunk.text_offset, offset) :]
        if not token_ids and not text:
            return None
        logprobs = messages.logprobs(chunk.logprobs[known:])
        self._token_ids.extend(token_ids)
        self._text.append(text)
        self._text_length += len(text)
        self._logprobs.extend(logprobs)
        return Delta(
            text=text,
            token_ids=tuple(token_ids),
            token_index=index,
            text_offset=offset,
            sample=self._index,
            logprobs=logprobs,
            best_effort=chunk.best_effort_continuation,
        )

    def finish(self, end: pb.StreamEnd) -> None:
        if self.usage is not None:
            raise ProtocolError(f"sample {self._index} ended twice")
        if end.usage.completion_tokens != len(self._token_ids):
            raise ProtocolError(f"{end.usage.completion_tokens} tokens were sent, {len(self._token_ids)} came")
        self._end = end
        self.usage = messages.usage(end.usage)
        messages.finish_reason(end.finish_reason)

    def value(self) -> Sample:
        stop_string, stop_token_id = messages.stop_reason(self._end)
        return Sample(
            index=self._index,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=messages.finish_reason(self._end.finish_reason),
            seed=self._seed,
            logprobs=tuple(self._logprobs),
            # Not the sum that was sent: after a resumption it lacks the tokens before it.
            cumulative_logprob=sum(one.logprob for one in self._logprobs) if self._logprobs else None,
            stop_string=stop_string,
            stop_token_id=stop_token_id,
            timings=messages.timings(self._end),
        )


def _known(what: str, length: int, position: int, have: int) -> int:
    """How many of ``length`` items that start at ``position`` are among the ``have`` items known already."""
    if length and position > have:
        raise ProtocolError(f"{what} gap in the stream: expected index {have}, got {position}")
    return max(have - position, 0)
