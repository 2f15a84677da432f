"""The reader's side of one sample: from the engine's news to what a caller is sent."""

from collections.abc import Sequence
from dataclasses import replace

from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError, invalid
from scheduler_service.api.live_requests import LiveRequest
from scheduler_service.api.messages import Finish, Outcome, TokenLogprob
from scheduler_service.api.output import Delta, Ending, FinishReason, Timings, TokenLogprobs, Usage
from scheduler_service.api.request import ResumePoint
from scheduler_service.api.sample_text import SampleText
from scheduler_service.api.streams import News, OutputStream
from scheduler_service.api.tokenizer import ModelTokenizer
from scheduler_service.api.validation import ValidatedRequest

_REASONS = {
    Outcome.STOP: FinishReason.STOP,
    Outcome.LENGTH: FinishReason.LENGTH,
    Outcome.ABORT: FinishReason.ABORT,
}


class Sample:
    """Reads one stream of a request.

    Attributes:
        stream: what it reads.
        finish: how the sample ended, in the engine's words; None while it goes on.
    """

    def __init__(
        self,
        live: LiveRequest,
        validated: ValidatedRequest,
        index: int,
        text: SampleText,
        tokenizer: ModelTokenizer | None,
        engine: EngineClient,
    ) -> None:
        """Create a reader of ``live.streams[index]``.

        Args:
            live: the request.
            validated: likewise.
            index: which sample.
            text: the sample's text, still empty.
            tokenizer: for the texts of log probabilities.
            engine: is told of stop strings, and when a slow reader has caught up.
        """
        self.stream: OutputStream = live.streams[index]
        self.finish: Finish | None = None
        self._live = live
        self._validated = validated
        self._index = index
        self._text = text
        self._tokenizer = tokenizer if validated.text else None
        self._engine = engine
        self._backlog = ""  # text that a resuming caller lacks
        self._ended_before: Finish | None = None  # with what it has
        self._text_offset = 0
        self._num_chunks = 0
        self._cumulative_logprob = 0.0
        self._prompt_done = validated.request.output.prompt_logprobs is None or index > 0

    def replay(self, point: ResumePoint, *, is_complete: bool = False) -> None:
        """Go through what the caller has of this sample already; once, before ``begin``, and on any thread.

        ``is_complete``: nothing can follow it in the request's grammar.

        Raises:
            RequestError: INVALID_ARGUMENT, the point lies behind the sample's end, or its text behind the tokens'.
        """
        text = self._text.push(point.token_ids)
        finish = self._finish_of(point.token_ids)
        if is_complete:
            finish = Finish(Outcome.STOP, stop_token_id=point.token_ids[-1])
        if finish is not None:
            text += self._text.flush()
        if self._text.num_tokens < len(point.token_ids) or self._stops_early(point.token_ids):
            raise invalid("resume", f"has tokens behind the end of sample {self._index}")
        text = text if self._validated.text else ""
        if point.text_offset > len(text):
            raise invalid("resume", f"has a text_offset behind the text of sample {self._index}'s tokens")
        self._backlog, self._text_offset = text[point.text_offset :], point.text_offset
        self._cumulative_logprob = self.stream.taken_logprob
        self._ended_before = Finish(Outcome.STOP) if self._text.match is not None else finish

    def begin(self) -> None:
        """Let the reader know what there is already: the sample's end, or text that it lacks."""
        if self._ended_before is not None:
            self.stream.finish(self._ended_before)
        elif self._backlog:
            self.stream.nudge()

    def release(self) -> None:
        """Have the engine go on with the sample if it was told to hold it."""
        if self.stream.held and not self.stream.ended:
            self._engine.release(self.stream)

    def take(self) -> Delta | None:
        """What is new; None if there is nothing after all.

        Raises:
            RequestError: the sample failed, and everything that came before has been taken.
        """
        news = self._read()
        stopped = self._text.match is not None
        index, offset = self._text.num_tokens, self._text_offset
        text = self._backlog + self._text.push(news.token_ids)
        if news.finish is not None:
            text += self._text.flush()
        elif self._text.match is not None and not stopped:
            self._engine.abort([self.stream])  # its answer brings what the usage needs
        count = self._text.num_tokens - index
        text = text if self._validated.text else ""
        self._backlog = ""
        self._text_offset += len(text)
        logprobs = self._logprobs(news.token_ids[:count], news.logprobs)
        delta = Delta(
            sample=self._index,
            chunk_index=self._num_chunks,
            token_index=index,
            token_ids=news.token_ids[:count],
            text=text,
            text_offset=offset,
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs(news),
            best_effort=news.best_effort,
            ending=None if news.finish is None else self._ending(news.finish),
        )
        self._num_chunks += delta.has_content
        return delta if delta.has_content or delta.ending or delta.prompt_logprobs else None

    def _read(self) -> News:
        try:
            news = self.stream.take()
        except RequestError:
            if self._text.match is None:
                raise
            # The sample was complete already; only the engine's account of it is missing.
            return News([], [], None, False, Finish(Outcome.ABORT))
        self.release()
        return news

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[TokenLogprobs]:
        if self._validated.request.output.logprobs is None:
            return []
        kept = logprobs[: len(token_ids)]
        self._cumulative_logprob += sum(one.logprob for one in kept)
        return [self._token_logprobs(*pair) for pair in zip(token_ids, kept, strict=True)]

    def _token_logprobs(self, token_id: int, logprob: TokenLogprob) -> TokenLogprobs:
        text, top_texts = "", []
        if self._tokenizer is not None:
            text = self._tokenizer.token_text(token_id)
            top_texts = [self._tokenizer.token_text(one) for one in logprob.top_token_ids]
        return TokenLogprobs(
            token_id, logprob.logprob, logprob.rank, logprob.top_token_ids, logprob.top_logprobs, text, top_texts
        )

    def _prompt_logprobs(self, news: News) -> list[TokenLogprobs] | None:
        token_ids = self._validated.prompt_token_ids
        if self._prompt_done or news.prompt_logprobs is None or len(news.prompt_logprobs) < len(token_ids) - 1:
            return None
        self._prompt_done = True
        return [
            self._token_logprobs(token_id, logprob)
            for token_id, logprob in zip(token_ids[1:].tolist(), news.prompt_logprobs, strict=True)
        ]

    def _finish_of(self, token_ids: Sequence[int]) -> Finish | None:
        """How the sample ended with these tokens, if it did; the engine knows no more of it then."""
        if self._is_stop(token_ids, len(token_ids) - 1):
            return Finish(Outcome.STOP, stop_token_id=token_ids[-1])
        return Finish(Outcome.LENGTH) if len(token_ids) >= self._validated.max_tokens else None

    def _stops_early(self, token_ids: Sequence[int]) -> bool:
        return any(self._is_stop(token_ids, index) for index in range(len(token_ids) - 1))

    def _is_stop(self, token_ids: Sequence[int], index: int) -> bool:
        return (
            index >= self._validated.request.stop.min_tokens
            and index >= 0
            and token_ids[index] in self._validated.stop_token_ids
        )

    def _ending(self, finish: Finish) -> Ending:
        match, reason = self._text.match, _REASONS[finish.outcome]
        if match is not None:
            reason = FinishReason.STOP
        elif reason is FinishReason.ABORT:
            reason = self._live.end_reason or reason
        by_id = reason is FinishReason.STOP and match is None and finish.stop_token_id in self._validated.stop_token_ids
        self.finish = replace(finish, outcome=Outcome(reason.value))
        return Ending(
            reason=reason,
            usage=Usage(len(self._validated.prompt_token_ids), finish.cached_tokens, self._text.num_tokens),
            stop_string=None if match is None else match.text,
            stop_token_id=finish.stop_token_id if by_id else None,
            cumulative_logprob=self._cumulative_logprob,
            timings=self._timings(finish) if self._validated.request.output.timings else None,
            executor_losses=finish.executor_losses,
        )

    def _timings(self, finish: Finish) -> Timings:
        arrived_at, stream = self._live.arrived_at, self.stream
        # Tokens behind a stop string came, but are none of the output.
        arrivals = [(moment, min(count, self._text.num_tokens)) for moment, count in stream.arrivals or ()]
        while len(arrivals) > 1 and arrivals[-2][1] == arrivals[-1][1]:
            arrivals.pop()
        return Timings(
            queue_us=finish.queue_us,
            first_token_us=_microseconds(stream.first_token_at - arrived_at) if stream.first_token_at else 0,
            total_us=_microseconds(stream.ended_at - arrived_at),
            batch_us=[_microseconds(moment - arrived_at) for moment, _ in arrivals],
            batch_tokens=[count for _, count in arrivals],
        )


def _microseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
