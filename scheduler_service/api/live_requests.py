"""The requests of this process: found by name, read by one call at a time, ended when nobody wants them any more."""

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import grpc
import numpy as np

from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError, invalid, overloaded, unavailable
from scheduler_service.api.messages import Finish, Outcome
from scheduler_service.api.output import FinishReason
from scheduler_service.api.request import GenerationRequest, ResumePoint
from scheduler_service.api.streams import Inbox, OutputStream
from scheduler_service.api.validation import ValidatedRequest

_log = logging.getLogger("baton.api")

# Neither names of tenants nor of requests can have it in them: they are printable.
_SEPARATOR = "\0"


class RequestKey(NamedTuple):
    """What a request is known by: names are each tenant's own."""

    tenant: str
    request_id: str

    def text(self) -> str:
        """The key as one text, for other api processes."""
        return f"{self.tenant}{_SEPARATOR}{self.request_id}"

    @classmethod
    def from_text(cls, text: str) -> "RequestKey":
        """The key that ``text`` gave."""
        tenant, _, request_id = text.partition(_SEPARATOR)
        return cls(tenant, request_id)


class LiveRequest:
    """One request, from its arrival on. Its reader may leave and another one take its place.

    Attributes:
        key: its name.
        arrived_at: in seconds of the monotonic clock.
        inbox: where its reader waits.
        streams: one per sample, once it is known to be sound.
        validated: None before that.
        submitted: whether the engine has been told of it.
        seed: of sample 0.
        model_fingerprint: of the executors at the time of submission.
        end_reason: why it was ended from here, if it was.
    """

    def __init__(self, key: RequestKey, engine: EngineClient) -> None:
        self.key = key
        self.arrived_at = time.monotonic()
        self.inbox = Inbox()
        self.streams: list[OutputStream] = []
        self.validated: ValidatedRequest | None = None
        self.submitted = False
        self.seed = 0
        self.model_fingerprint = ""
        self.end_reason: FinishReason | None = None
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

    def change_reader(self, points: tuple[ResumePoint, ...]) -> None:
        """Turn to a new reader, who goes on from ``points``; the old one, if it is still there, fails ABORTED.

        Raises:
            RequestError: INVALID_ARGUMENT, a point is none of this request's output.
        """
        have = {point.sample: point.token_ids for point in points}
        for index, stream in enumerate(self.streams):
            if not stream.has_put_out(have.get(index, ())):
                raise invalid("resume", f"is not what sample {index} of the running request has put out")
        inbox = Inbox()
        for index, stream in enumerate(self.streams):
            stream.rewind(len(have.get(index, ())), inbox)
        self.inbox.close(RequestError(grpc.StatusCode.ABORTED, "", "another call has taken this stream over"))
        self.inbox = inbox

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

    def __init__(self, engine: EngineClient, max_samples: int) -> None:
        """Create an empty collection that takes requests with ``max_samples`` in all."""
        self._engine = engine
        self._max_samples = max_samples
        self._num_samples = 0
        self._requests: dict[RequestKey, LiveRequest] = {}
        self._held: dict[RequestKey, asyncio.TimerHandle] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, key: RequestKey) -> LiveRequest | None:
        """The request of this name."""
        return self._requests.get(key)

    def open(self, key: RequestKey) -> LiveRequest:
        """Enter a request that has just arrived.

        Raises:
            RequestError: ALREADY_EXISTS, the name is in use; RESOURCE_EXHAUSTED, there are too many; UNAVAILABLE, the
                scheduler is shutting down.
        """
        if self._draining:
            raise unavailable("the scheduler is shutting down")
        if key in self._requests:
            raise name_in_use()
        if self._num_samples >= self._max_samples:
            raise self._too_many()
        live = self._requests[key] = LiveRequest(key, self._engine)
        self._num_samples += 1
        self._idle.clear()
        return live

    def start(self, live: LiveRequest, validated: ValidatedRequest, seed: int, streams: list[OutputStream]) -> None:
        """The request is sound and about to be submitted.

        Raises:
            RequestError: RESOURCE_EXHAUSTED, its samples are too many.
        """
        if self._num_samples - 1 + len(streams) > self._max_samples:
            raise self._too_many()
        self._num_samples += len(streams) - 1
        live.validated, live.seed, live.streams = validated, seed, streams
        live.model_fingerprint = self._engine.limits.model_fingerprint

    def take_over(self, live: LiveRequest, validated: ValidatedRequest) -> Inbox:
        """A caller has come back for a request; where it reads.

        Raises:
            RequestError: ALREADY_EXISTS, it is not the same request; INVALID_ARGUMENT, its resume points are not of
                this request's output; UNAVAILABLE, the scheduler is shutting down.
        """
        if self._draining:
            raise unavailable("the scheduler is shutting down")
        if not live.is_same(validated):
            raise name_in_use()
        live.change_reader(validated.request.resume)
        timer = self._held.pop(live.key, None)
        if timer is not None:
            timer.cancel()
        self._idle.clear()
        return live.inbox

    def leave(self, live: LiveRequest, inbox: Inbox, *, lost: bool) -> None:
        """A reader has gone; ``lost`` says that its connection has, and so it may come back."""
        if live.inbox is not inbox or self._requests.get(live.key) is not live:
            return  # another has taken its place
        if not lost or not live.resume_window or self._draining:
            self.drop(live)
            return
        loop = asyncio.get_running_loop()
        self._held[live.key] = loop.call_later(live.resume_window, self.drop, live)
        self._note_idle()

    def drop(self, live: LiveRequest) -> None:
        """Forget a request."""
        live.close()
        del self._requests[live.key]
        timer = self._held.pop(live.key, None)
        if timer is not None:
            timer.cancel()
        self._num_samples -= max(1, len(live.streams))
        self._note_idle()

    def abort(self, keys: Iterable[RequestKey]) -> list[RequestKey]:
        """End requests by name; the names that are not known here."""
        unknown = []
        for key in keys:
            live = self._requests.get(key)
            if live is None:
                unknown.append(key)
            elif key in self._held:
                self.drop(live)
            else:
                live.end(FinishReason.ABORT)
        return unknown

    async def drain(self, grace: float) -> None:
        """Take no more requests; those under way get ``grace`` seconds, then fail UNAVAILABLE."""
        self._draining = True
        for key in list(self._held):
            self.drop(self._requests[key])
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            _log.info("%d requests outlived the grace period", len(self._requests))
        for live in self._requests.values():
            live.fail(unavailable("the scheduler is shutting down"))

    def _note_idle(self) -> None:
        if len(self._requests) == len(self._held):
            self._idle.set()

    def _too_many(self) -> RequestError:
        return overloaded(f"{self._num_samples} requests are under way already")


def name_in_use() -> RequestError:
    """Another request has this name."""
    return RequestError(grpc.StatusCode.ALREADY_EXISTS, "request_id", "a request of this name is under way")


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
