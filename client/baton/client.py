"""The synchronous client."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from baton import messages
from baton.channel import HEALTH_METHOD, HEALTH_REQUEST, HEALTH_SERVING, channel_options
from baton.errors import DeadlineExceededError, RequestCancelledError, UnavailableError, error_from_call
from baton.folding import StreamFolder
from baton.messages import GenerateOptions
from baton.values import ChatMessage, ClusterStatus, Completion, Delta, ModelInfo, Prompt
from baton_protos import generation_pb2 as pb
from baton_protos.generation_pb2_grpc import GenerationStub

_POLL_SECONDS = 0.1


class Stream(Iterator[Delta]):
    """A running request: iterate for its deltas, then read ``completion``.

    Closing it early aborts the request: by ``close()``, by leaving a ``with`` block, by dropping the last reference,
    or by an exception, such as Ctrl-C, while waiting for the next delta.
    """

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target
        self._folder = StreamFolder()

    @property
    def request_id(self) -> str:
        """The request's id; empty before the first delta."""
        return self._folder.request_id

    @property
    def completion(self) -> Completion:
        """The finished request.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        if (completion := self._folder.completion) is None:
            raise RuntimeError("the stream has not been read to its end; result() does that")
        return completion

    def result(self) -> Completion:
        """Reads what is left of the stream and returns the finished request; raises as iterating does."""
        for _ in self:
            pass
        return self.completion

    def close(self) -> None:
        """Aborts the request unless it has ended. May be called from any thread, any number of times."""
        self._call.cancel()

    def __next__(self) -> Delta:
        """The next delta.

        Raises:
            StopIteration: the request has ended; ``completion`` is there.
            BatonError: the request failed, the connection was lost, or the stream was closed.
        """
        try:
            while True:
                response = next(self._call)
                if (delta := self._folder.add(response)) is not None:
                    return delta
        except StopIteration:
            self._folder.finished()
            raise
        except grpc.RpcError as error:
            raise error_from_call(error, self._target) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class PendingCompletion:
    """A request that was submitted and may still run. Dropping the last reference aborts it."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target

    def result(self) -> Completion:
        """Waits for the request's end.

        Raises:
            BatonError: the request failed, the connection was lost, or the request was cancelled.
        """
        return messages.completion(_result(self._call, self._target))

    def when_done(self, callback: Callable[[], object]) -> None:
        """Calls ``callback`` once the request has ended, however it did: from another thread, or here and now."""
        self._call.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """Aborts the request unless it has ended. May be called from any thread, any number of times."""
        self._call.cancel()


class Client:
    """Talks to a Baton scheduler. Safe to share between threads.

    Every call raises a ``BatonError`` of the kind that fits: ``InvalidRequestError``, ``ModelNotFoundError``,
    ``OverloadedError``, ``UnavailableError``, ``DeadlineExceededError``, ``RequestFailedError``. Lost connections are
    retried for a moment as long as nothing of an answer has arrived.

    Args:
        target: the scheduler's gRPC address, ``"host:port"``.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, options=channel_options())
        self._stub = GenerationStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = self._channel.unary_unary(HEALTH_METHOD)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Runs a request to its end.

        Args:
            prompt: text, token ids, or chat messages.
            timeout: seconds for the whole request; it is aborted when they run out. None = no limit.
            options: max_tokens, temperature, top_k, top_p, seed, stop_token_ids, ignore_eos, request_id, model:
                see ``GenerateOptions``.

        Raises:
            BatonError: see the class.
        """
        return self.submit(prompt, timeout=timeout, **options).result()

    def submit(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> PendingCompletion:
        """Like ``generate``, but returns at once: many requests can run at a time without a thread for each."""
        request = messages.generate_request(prompt, **options)
        return PendingCompletion(self._stub.Generate.future(request, timeout=timeout), self.target)

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Like ``generate``, but returns at once and yields the output as it comes."""
        request = messages.generate_request(prompt, **options)
        return Stream(self._stub.GenerateStream(request, timeout=timeout), self.target)

    def abort(self, *request_ids: str, timeout: float | None = None) -> None:
        """Ends running requests; they finish with ``FinishReason.ABORT``. Unknown ids are ignored."""
        self._call(self._stub.Abort, pb.AbortRequest(request_ids=request_ids), timeout)

    def tokenize(
        self,
        prompt: str | Sequence[ChatMessage] | Sequence[Mapping[str, str]],
        *,
        timeout: float | None = None,
    ) -> tuple[int, ...]:
        """The token ids of a text or a conversation."""
        return tuple(self._call(self._stub.Tokenize, messages.tokenize_request(prompt), timeout).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """The text of token ids."""
        request = messages.detokenize_request(token_ids, skip_special_tokens)
        return str(self._call(self._stub.Detokenize, request, timeout).text)

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """The served model."""
        return messages.model_info(self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout))

    def cluster_status(self, *, timeout: float | None = None) -> ClusterStatus:
        """The scheduler's view of its executors and queues."""
        request = pb.GetClusterStatusRequest()
        return messages.cluster_status(self._call(self._stub.GetClusterStatus, request, timeout))

    def wait_ready(self, timeout: float | None = None) -> None:
        """Returns once the scheduler serves: it is up and has an executor.

        Raises:
            UnavailableError: not within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                if self._call(self._health, HEALTH_REQUEST, 1.0) == HEALTH_SERVING:
                    return
                reason = "it has no executor that is ready"
            except (UnavailableError, DeadlineExceededError) as error:
                reason = error.message
            if deadline is not None and time.monotonic() >= deadline:
                raise UnavailableError(f"{self.target} is not ready after {timeout:g} s: {reason}")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Ends the connection and every stream on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        return _result(method.future(request, timeout=timeout), self.target)


def _result(call: Any, target: str) -> Any:
    try:
        return call.result()
    except grpc.RpcError as error:
        raise error_from_call(error, target) from error
    except grpc.FutureCancelledError as error:
        raise RequestCancelledError("the request was cancelled, or the client closed") from error
    except BaseException:  # Ctrl-C while waiting: do not leave the request running
        call.cancel()
        raise
