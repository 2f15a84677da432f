"""What is known of a stream so far: enough to continue it on another scheduler, with nothing lost or repeated."""

import random
from dataclasses import dataclass, field

import grpc

from baton.errors import (
    BatonError,
    ConnectFailedError,
    OverloadedError,
    RequestCancelledError,
    RequestExistsError,
    RequestFailedError,
    UnavailableError,
)
from baton_protos import generation_pb2 as pb

_PUSH_BACK = "grpc-retry-pushback-ms"
_CONNECTION_LOST = "RST_STREAM"  # how gRPC words an INTERNAL that comes from the transport


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """How hard to try. Waits double from ``first_wait`` to ``longest_wait`` seconds, each shortened at random.

    Attributes:
        attempts: calls to each endpoint to begin a stream, before anything of it has come: enough of them, where there
            are several, to outlast the pause that a channel makes after its server was not there.
        patience: seconds since a stream broke, without a single new token, after which it is given up; 0 = at once.
    """

    attempts: int = 4
    patience: float = 60.0
    first_wait: float = 0.1
    longest_wait: float = 2.0


DEFAULT_POLICY = ResumePolicy()


@dataclass(slots=True)
class _SampleLog:
    token_ids: list[int] = field(default_factory=list)
    text_length: int = 0
    has_ended: bool = False


class StreamLog:
    """Follows one stream over all its calls. Times are seconds of a steady clock.

    Attributes:
        interruptions: how often the stream broke and was taken up again.
    """

    def __init__(self, request: pb.GenerateRequest, policy: ResumePolicy, num_endpoints: int) -> None:
        self.interruptions = 0
        self._request = request
        self._policy = policy
        self._num_endpoints = num_endpoints
        self._rng = random.Random()
        self._start: pb.StreamStart | None = None
        self._samples = {one.sample: _SampleLog(list(one.token_ids), one.text_offset) for one in request.resume}
        self._has_prompt_logprobs = False
        self._is_exact = True
        self._attempts = 0  # that failed in a row, since the last token
        self._broken_at = 0.0
        self._has_failed = False

    @property
    def has_ended(self) -> bool:
        """Whether the last message of every sample has come."""
        return sum(sample.has_ended for sample in self._samples.values()) >= max(1, self._request.n)

    def request(self) -> pb.GenerateRequest:
        """What to ask for next: the request itself, or its continuation."""
        start = self._start
        if start is None:
            return self._request
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        request.request_id = start.request_id
        request.sampling.seed = start.seed
        if start.prompt_token_ids:
            request.token_ids.ids[:] = start.prompt_token_ids
        del request.resume[:]
        for index, sample in sorted(self._samples.items()):
            request.resume.add(sample=index, token_ids=sample.token_ids, text_offset=sample.text_length)
        return request

    def add(self, response: pb.GenerateStreamResponse) -> pb.GenerateStreamResponse | None:
        """Takes note of a message; it, or None if it tells nothing new because it only begins a continuation."""
        match response.WhichOneof("event"):
            case "start":
                return self._add_start(response)
            case "chunk":
                return self._add_chunk(response)
            case "end":
                sample = self._sample(response.end.sample)
                if sample.has_ended:
                    return None
                sample.has_ended = True
            case "prompt_logprobs":
                if self._has_prompt_logprobs:
                    return None
                self._has_prompt_logprobs = True
        return response

    def broken(self, error: BatonError, call: grpc.RpcError, now: float) -> float:
        """A call has failed: how many seconds to wait before the next one, to the next endpoint.

        Raises:
            BatonError: ``error``, when trying again is no use.
        """
        if not self._may_try_again(error, call):
            self._has_failed = True
            raise error
        self._attempts += 1
        if self._attempts == 1:
            self._broken_at = now
        if self._start is not None:
            if now - self._broken_at >= self._policy.patience:
                self._has_failed = True
                raise error
            self.interruptions += self._attempts == 1
        if self._attempts < self._num_endpoints:
            return 0.0  # the others may well be there
        policy = self._policy
        doublings = min(self._attempts - self._num_endpoints, 30)
        longest: float = min(policy.first_wait * 2.0**doublings, policy.longest_wait)
        wait = longest * self._rng.uniform(0.5, 1.0)
        if isinstance(error, OverloadedError | UnavailableError) and error.retry_after is not None:
            wait = max(wait, min(error.retry_after, policy.longest_wait))
        return wait

    def farewell(self) -> pb.AbortRequest | None:
        """What a reader who leaves now has to send: with a resume window, a request outlives its cancelled call.

        None where there is no need, or nothing says that the request of this name is this one.
        """
        if not self._request.resume_window_ms or self._start is None or self._has_failed or self.has_ended:
            return None
        return pb.AbortRequest(request_ids=[self._start.request_id])

    def _may_try_again(self, error: BatonError, call: grpc.RpcError) -> bool:
        if self._start is None:
            attempts = self._policy.attempts * self._num_endpoints
            return isinstance(error, UnavailableError) and not is_pushed_back(call) and self._attempts + 1 < attempts
        if is_pushed_back(call) and not any(sample.token_ids for sample in self._samples.values()):
            return False  # it has waited in the queue for as long as it may, and there is nothing to save
        if isinstance(error, RequestFailedError):
            return _CONNECTION_LOST in error.message
        return isinstance(
            error,
            # CANCELLED without our doing is a server that stops; EXISTS is one that has not noticed the break yet
            UnavailableError | ConnectFailedError | OverloadedError | RequestExistsError | RequestCancelledError,
        )

    def _add_start(self, response: pb.GenerateStreamResponse) -> pb.GenerateStreamResponse | None:
        if self._start is None:
            self._start = response.start
            self._attempts = 0
            return response
        self._is_exact &= response.start.model_fingerprint == self._start.model_fingerprint
        return None

    def _add_chunk(self, response: pb.GenerateStreamResponse) -> pb.GenerateStreamResponse | None:
        chunk = response.chunk
        sample = self._sample(chunk.sample)
        if sample.has_ended:
            return None
        new_ids = chunk.token_ids[max(0, len(sample.token_ids) - chunk.token_index) :]
        text_end = chunk.text_offset + len(chunk.text)
        if new_ids or text_end > sample.text_length:
            self._attempts = 0
        sample.token_ids.extend(new_ids)
        sample.text_length = max(sample.text_length, text_end)
        if not self._is_exact:
            chunk.best_effort_continuation = True
        return response

    def _sample(self, index: int) -> _SampleLog:
        return self._samples.setdefault(index, _SampleLog())


def is_pushed_back(call: grpc.RpcError) -> bool:
    """Whether the server asks not to be tried again."""
    metadata = call.trailing_metadata() or ()
    return any(key == _PUSH_BACK and str(value).startswith("-") for key, value in metadata)
