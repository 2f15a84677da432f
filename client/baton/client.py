"""The synchronous client."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from baton import messages
from baton.channel import HEALTH_REQUEST, HEALTH_SERVING, open_channel
from baton.credentials import Credentials
from baton.endpoints import Endpoint, Endpoints
from baton.errors import (
    BatonError,
    DeadlineExceededError,
    ExecutorNotFoundError,
    ModelNotFoundError,
    RequestCancelledError,
    UnavailableError,
    error_from_call,
)
from baton.folding import StreamFolder
from baton.options import GenerateOptions
from baton.resubmit import ResubmittedCall
from baton.resume import ResumingCall
from baton.stream_log import DEFAULT_POLICY, ResumePolicy
from baton.values import ChatMessage, ClusterStatus, Completion, Delta, ModelInfo, Prompt
from baton_protos import admin_pb2
from baton_protos import generation_pb2 as pb

_POLL_SECONDS = 0.1


class Stream(Iterator[Delta]):
    """A running request: iterate for its deltas, then read ``completion``.

    Closing it early aborts the request: by ``close()``, by leaving a ``with`` block, by dropping the last reference,
    or by an exception, such as Ctrl-C, while waiting for the next delta.
    """

    def __init__(self, call: ResumingCall) -> None:
        self._call = call
        self._folder = StreamFolder()

    @property
    def interruptions(self) -> int:
        """How often the stream broke and was taken up again, on the same scheduler or another."""
        return self._call.interruptions

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
            BatonError: the request failed, its connection was lost for good, or the stream was closed.
        """
        try:
            while True:
                response = next(self._call)
                if (delta := self._folder.add(response)) is not None:
                    return delta
        except StopIteration:
            self._folder.finished()
            raise
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
        with suppress(AttributeError):  # Ctrl-C came before it had its call
            self.close()


class PendingCompletion:
    """A request that was submitted and may still run. Dropping the last reference aborts it."""

    def __init__(self, call: ResubmittedCall) -> None:
        self._call = call

    def result(self) -> Completion:
        """Waits for the request's end.

        Raises:
            BatonError: the request failed, the connection was lost, or the request was cancelled.
        """
        return messages.completion(_result(self._call, self._call.target))

    def when_done(self, callback: Callable[[], object]) -> None:
        """Calls ``callback`` once the request has ended, however it did: from another thread, or here and now."""
        self._call.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """Aborts the request unless it has ended. May be called from any thread, any number of times."""
        self._call.cancel()

    def __del__(self) -> None:
        with suppress(AttributeError):  # Ctrl-C came before it had its call
            self.cancel()


class Client:
    """Talks to a Baton scheduler, or to several that serve the same model. Safe to share between threads.

    A request outlives its scheduler: ``generate`` and ``stream`` take a broken stream up again, on another scheduler or
    on the same once it is back, with the tokens that have come, and go on with the next one.

    Every call raises a ``BatonError`` of the kind that fits: ``InvalidRequestError``, ``ModelNotFoundError``,
    ``OverloadedError``, ``UnavailableError``, ``DeadlineExceededError``, ``RequestFailedError``. Lost connections are
    retried for a moment as long as nothing of an answer has arrived.

    Args:
        target: the schedulers' gRPC addresses: ``"host:port"``, several separated by commas, or a list.
        credentials: what the scheduler asks for; default: ``Credentials.from_environment()``.
        resume: how hard to try to take up a broken stream again.

    Raises:
        CredentialsError: the credentials cannot be used.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        credentials: Credentials | None = None,
        resume: ResumePolicy = DEFAULT_POLICY,
    ) -> None:
        credentials = Credentials.from_environment() if credentials is None else credentials
        self._resume = resume
        self._endpoints = Endpoints(target, credentials, open_channel)
        self.target = ",".join(self._endpoints.targets)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Runs a request to its end.

        Args:
            prompt: text, token ids, or chat messages.
            timeout: seconds for the whole request; it is aborted when they run out. None = no limit.
            options: max_tokens, temperature, stop, n, logprobs and many more: see ``GenerateOptions``.

        Raises:
            BatonError: see the class.
        """
        return self.stream(prompt, timeout=timeout, **options).result()

    def submit(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> PendingCompletion:
        """Like ``generate``, but returns at once: many requests can run at a time without a thread for each.

        When its scheduler is lost, it runs again from the beginning, on another one.
        """
        request = messages.generate_request(prompt, **options)
        return PendingCompletion(ResubmittedCall(self._endpoints, request, timeout))

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Like ``generate``, but returns at once and yields the output as it comes."""
        request = messages.generate_request(prompt, **options)
        return Stream(ResumingCall(self._endpoints, request, timeout, self._resume))

    def abort(self, *request_ids: str, timeout: float | None = None) -> None:
        """Ends running requests; they finish with ``FinishReason.ABORT``. Unknown ids are ignored."""
        request = pb.AbortRequest(request_ids=request_ids)
        failures = []
        for endpoint in self._endpoints:  # who has the requests is not known here
            try:
                _ask(endpoint, endpoint.stub.Abort, request, timeout)
            except UnavailableError as error:
                failures.append(error)
        if len(failures) == len(self._endpoints):
            raise failures[0]

    def tokenize(
        self,
        prompt: str | Sequence[ChatMessage] | Sequence[Mapping[str, str]],
        *,
        timeout: float | None = None,
    ) -> tuple[int, ...]:
        """The token ids of a text or a conversation."""
        return tuple(self._call("Tokenize", messages.tokenize_request(prompt), timeout).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """The text of token ids."""
        request = messages.detokenize_request(token_ids, skip_special_tokens)
        return str(self._call("Detokenize", request, timeout).text)

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """The served model."""
        return messages.model_info(self._call("GetModelInfo", pb.GetModelInfoRequest(), timeout))

    def cluster_status(self, *, timeout: float | None = None) -> ClusterStatus:
        """The scheduler's view of its executors and queues."""
        request = pb.GetClusterStatusRequest()
        return messages.cluster_status(self._call("GetClusterStatus", request, timeout))

    def pause_executor(self, executor_id: str, *, timeout: float | None = None) -> None:
        """Gives an executor no new requests; those that run there go on.

        Raises:
            ExecutorNotFoundError: there is none of this name.
        """
        self._command(executor_id, lambda stub: stub.PauseExecutor, admin_pb2.PauseExecutorRequest, timeout)

    def resume_executor(self, executor_id: str, *, timeout: float | None = None) -> None:
        """Ends a pause, or a drain that is under way; raises as ``pause_executor``."""
        self._command(executor_id, lambda stub: stub.ResumeExecutor, admin_pb2.ResumeExecutorRequest, timeout)

    def drain_executor(self, executor_id: str, *, timeout: float | None = None) -> None:
        """Hands an executor's requests to others, then ends its process; returns at once, raises as
        ``pause_executor``."""
        self._command(executor_id, lambda stub: stub.DrainExecutor, admin_pb2.DrainExecutorRequest, timeout)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Returns once a scheduler serves: it is up and has an executor.

        Raises:
            UnavailableError: not within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        reason = ""
        while True:
            for endpoint in self._endpoints:
                try:
                    if _ask(endpoint, endpoint.health, HEALTH_REQUEST, 1.0) == HEALTH_SERVING:
                        return
                    reason = "it has no executor that is ready"
                except (UnavailableError, DeadlineExceededError) as error:
                    reason = error.message
            if deadline is not None and time.monotonic() >= deadline:
                raise UnavailableError(f"{self.target} is not ready after {timeout:g} s: {reason}")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Ends the connection and every stream on it."""
        for call in [*self._endpoints.farewells]:
            with suppress(grpc.FutureCancelledError):
                call.exception()  # waits; whether it went well makes no difference
        for endpoint in self._endpoints:
            endpoint.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _command(
        self, executor_id: str, method: Callable[[Any], Any], request: Callable[..., Any], timeout: float | None
    ) -> None:
        """Gives an order to whichever scheduler has the executor."""
        failure: BatonError | None = None
        for endpoint in self._endpoints:
            try:
                _ask(endpoint, method(endpoint.admin), request(executor_id=executor_id), timeout)
            except ModelNotFoundError as error:
                failure = ExecutorNotFoundError(error.message, code=error.code)
            except UnavailableError as error:
                failure = failure or error
            else:
                return
        assert failure is not None
        raise failure

    def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        """The answer of the first scheduler that can be reached."""
        unreachable: UnavailableError | None = None
        for endpoint in self._endpoints.preferred():
            try:
                result = _ask(endpoint, getattr(endpoint.stub, method), request, timeout)
            except UnavailableError as error:
                unreachable = unreachable or error
                continue
            self._endpoints.mark_good(endpoint)
            return result
        assert unreachable is not None
        raise unreachable


def _ask(endpoint: Endpoint, method: Any, request: Any, timeout: float | None) -> Any:
    return _result(method.future(request, timeout=timeout, metadata=endpoint.metadata), endpoint.target)


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
