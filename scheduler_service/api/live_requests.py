"""The requests of this process: found by name, read by one call at a time, ended when nobody wants them any more."""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace

import grpc
import numpy as np

from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError, invalid, overloaded, unavailable
from scheduler_service.api.holds import HoldEnd, Holds
from scheduler_service.api.messages import Finish, Outcome
from scheduler_service.api.output import FinishReason
from scheduler_service.api.request import GenerationRequest, ResumePoint
from scheduler_service.api.request_key import RequestKey
from scheduler_service.api.streams import Inbox, OutputStream
from scheduler_service.api.validation import ValidatedRequest

_log = logging.getLogger("baton.api")


class LiveRequest:
    """One request, from its arrival on. Its reader may leave and another one take its place.

    Attributes:
        key: its name.
        arrived_at: in seconds of the machine's monotonic clock.
        call_arrived_at: when the present reader's call did, likewise.
        inbox: where its reader waits.
        streams: one per sample, once it is known to be sound.
        validated: None before that.
        submitted: whether the engine has been told of it.
        seed: of sample 0.
        model_fingerprint: of the executors at the time of submission.
        end_reason: why it was ended from here, if it was.
        is_superseded: a later call has taken the request over in another process.
    """

    def __init__(self, key: RequestKey, engine: EngineClient, arrived_at: float) -> None:
        self.key = key
        self.arrived_at = arrived_at
        self.call_arrived_at = arrived_at
        self.inbox = Inbox()
        self.streams: list[OutputStream] = []
        self.validated: ValidatedRequest | None = None
        self.submitted = False
        self.seed = 0
        self.model_fingerprint = ""
        self.end_reason: FinishReason | None = None
        self.is_superseded = False
        self._engine = engine
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def resume_window(self) -> float:
        """Seconds that it outlives a lost connection; 0 as long as it is not submitted."""
        if self.validated is None or not self.submitted:
            return 0.0
        return self.validated.request.resume_window_ms / 1000

    def set_deadline(self, seconds: float | None) -> None:
        """End it so many seconds from now, at once if there are none left; None = whenever it ends by itself."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None and seconds <= 0:
            self.end(FinishReason.DEADLINE)
        elif seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.end, FinishReason.DEADLINE)

    def end(self, reason: FinishReason) -> None:
        """Let it end early; the tokens that have come by then are still delivered. The first reason counts."""
        self.end_reason = self.end_reason or reason
        running = [stream for stream in self.streams if not stream.ended]
        for stream in running:
            if not stream.submitted:
                stream.finish(Finish(Outcome.ABORT))
        self._engine.abort([stream for stream in running if stream.submitted])

    def fail(self, error: RequestError) -> None:
        """Give its reader an error."""
        self.inbox.close(error)

    def can_go_on(self, points: tuple[ResumePoint, ...]) -> bool:
        """Whether a reader who has ``points`` can go on here; not where another process has served it since.

        Raises:
            RequestError: INVALID_ARGUMENT, a point is none of this request's output.
        """
        have = {point.sample: point.token_ids for point in points}
        for index, stream in enumerate(self.streams):
            if not stream.agrees_with(have.get(index, ())):
                raise invalid("resume", f"is not what sample {index} of the running request has put out")
        reaches = all(stream.reaches(len(have.get(index, ()))) for index, stream in enumerate(self.streams))
        return reaches and not self.is_superseded

    def change_reader(self, points: tuple[ResumePoint, ...], arrived_at: float) -> None:
        """Turn to a new reader, who can go on from ``points``; the old one, if it is still there, fails ABORTED."""
        have = {point.sample: point.token_ids for point in points}
        inbox = Inbox()
        for index, stream in enumerate(self.streams):
            stream.rewind(len(have.get(index, ())), inbox)
        self.fail(_taken_over())
        self.inbox, self.call_arrived_at = inbox, arrived_at

    def is_same(self, other: ValidatedRequest) -> bool:
        """Whether ``other`` asks for the same output."""
        mine = self.validated
        if mine is None:
            return False
        seeds = (mine.request.sampling.seed, self.seed)  # as it was sent, or as StreamStart told it
        return (
            other.request.sampling.seed in seeds
            and mine.max_tokens == other.max_tokens
            and np.array_equal(mine.prompt_token_ids, other.prompt_token_ids)
            and _essence(mine.request) == _essence(other.request)
        )

    def close(self) -> None:
        """Nobody wants it any more: what still runs of it is aborted."""
        self.set_deadline(None)
        for stream in self.streams:
            self._engine.forget(stream)


class LiveRequests:
    """All requests of this process, those included that wait for their caller to come back."""

    def __init__(self, engine: EngineClient, max_waiting: int, holds: Holds) -> None:
        """Create an empty collection; ``holds`` has its own ones.

        It takes as many samples as can run, and ``max_waiting`` besides: the engine, which knows those of other api
        processes too, would refuse the next one, but only when its prompt has been tokenised.
        """
        self._engine = engine
        self._max_waiting = max_waiting
        self._num_samples = 0
        self._requests: dict[RequestKey, LiveRequest] = {}
        self._holds = holds
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, key: RequestKey) -> LiveRequest | None:
        """The request of this name."""
        return self._requests.get(key)

    def open(self, key: RequestKey, arrived_at: float) -> LiveRequest:
        """Enter a request whose call arrived then, in seconds of the machine's monotonic clock.

        Raises:
            RequestError: ALREADY_EXISTS, the name is in use; RESOURCE_EXHAUSTED, there are too many; UNAVAILABLE, the
                scheduler is shutting down.
        """
        if self._draining:
            raise unavailable("the scheduler is shutting down")
        if key in self._requests:
            raise name_in_use()
        if self._num_samples >= self._max_samples():
            raise self._too_many()
        live = self._requests[key] = LiveRequest(key, self._engine, arrived_at)
        self._num_samples += 1
        self._idle.clear()
        return live

    def start(self, live: LiveRequest, validated: ValidatedRequest, seed: int, streams: list[OutputStream]) -> None:
        """The request is sound and about to be submitted.

        Raises:
            RequestError: RESOURCE_EXHAUSTED, its samples are too many.
        """
        if self._num_samples - 1 + len(streams) > self._max_samples():
            raise self._too_many()
        self._num_samples += len(streams) - 1
        live.validated, live.seed, live.streams = validated, seed, streams
        live.model_fingerprint = self._engine.limits.model_fingerprint

    def take_over(self, live: LiveRequest, validated: ValidatedRequest, arrived_at: float) -> Inbox | None:
        """A caller has come back for a request, with a call that arrived then; where it reads.

        None: it has been served elsewhere since, so that this copy of the request is of no use any more and is dropped.

        Raises:
            RequestError: ABORTED, a call that arrived later has it; ALREADY_EXISTS, it is not the same request;
                INVALID_ARGUMENT, its resume points are not of this request's output; UNAVAILABLE, the scheduler is
                shutting down.
        """
        if self._draining:
            raise unavailable("the scheduler is shutting down")
        if not live.is_same(validated):
            raise name_in_use()
        if arrived_at < live.call_arrived_at:
            raise _taken_over()
        if not live.can_go_on(validated.request.resume):
            live.fail(_taken_over())
            self.drop(live)
            return None
        live.change_reader(validated.request.resume, arrived_at)
        self._holds.end(live.key, HoldEnd.RESUMED)
        self._idle.clear()
        return live.inbox

    def leave(self, live: LiveRequest, inbox: Inbox, *, lost: bool) -> None:
        """A reader has gone; ``lost`` says that its connection has, and so it may come back."""
        if live.inbox is not inbox or self._requests.get(live.key) is not live:
            return  # another has taken its place
        if not lost or not live.resume_window or self._draining:
            self.drop(live)
            return
        self._holds.begin(live.key, live.resume_window, lambda: self.drop(live))
        self._note_idle()

    def drop(self, live: LiveRequest) -> None:
        """Forget a request."""
        live.close()
        del self._requests[live.key]
        self._holds.end(live.key, HoldEnd.DROPPED)
        self._num_samples -= max(1, len(live.streams))
        self._note_idle()

    def abort(self, keys: Iterable[RequestKey]) -> list[RequestKey]:
        """End requests by name; the names that are not known here."""
        unknown = []
        for key in keys:
            live = self._requests.get(key)
            if live is None:
                unknown.append(key)
            elif key in self._holds:
                self.drop(live)
            else:
                live.end(FinishReason.ABORT)
        return unknown

    def supersede(self, keys: Iterable[RequestKey], taken_over_at: float) -> None:
        """Calls that arrived then have taken requests over in another process: what earlier ones began here ends, and
        whoever still reads it fails ABORTED.
        """
        for key in keys:
            live = self._requests.get(key)
            if live is not None and live.call_arrived_at < taken_over_at:
                live.is_superseded = True
                self.abort([key])
                live.fail(_taken_over())

    async def drain(self, grace: float) -> None:
        """Take no more requests; those under way get ``grace`` seconds, then fail UNAVAILABLE."""
        self._draining = True
        for key in self._holds.waiting():
            self.drop(self._requests[key])
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            _log.info("%d requests outlived the grace period", len(self._requests))
        for live in self._requests.values():
            live.fail(unavailable("the scheduler is shutting down"))

    def _note_idle(self) -> None:
        if len(self._requests) == len(self._holds):
            self._idle.set()

    def _max_samples(self) -> int:
        return self._engine.limits.max_rows + self._max_waiting

    def _too_many(self) -> RequestError:
        return overloaded(f"{self._num_samples} requests are under way already")


def name_in_use() -> RequestError:
    """Another request has this name."""
    return RequestError(grpc.StatusCode.ALREADY_EXISTS, "request_id", "a request of this name is under way")


def _taken_over() -> RequestError:
    return RequestError(grpc.StatusCode.ABORTED, "", "another call has taken this stream over")


def _essence(request: GenerationRequest) -> GenerationRequest:
    """A request without what may differ in a retry, and what is compared apart from it."""
    return replace(
        request,
        prompt=None,
        sampling=replace(request.sampling, seed=None),
        stop=replace(request.stop, max_tokens=None, deadline_unix_ms=0),
        output=replace(request.output, prompt_token_ids=True),
        priority=0,
        queue_timeout_ms=0,
        resume=(),
        resume_window_ms=0,
    )
