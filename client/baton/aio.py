"""The asyncio client."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from baton import messages
from baton.channel import HEALTH_REQUEST, HEALTH_SERVING, open_aio_channel
from baton.credentials import Credentials
from baton.endpoints import Endpoint, Endpoints, parse_targets
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
from baton.resume import AsyncResumingCall
from baton.stream_log import DEFAULT_POLICY, ResumePolicy
from baton.values import ChatMessage, ClusterStatus, Completion, Delta, ModelInfo, Prompt
from baton_protos import admin_pb2
from baton_protos import generation_pb2 as pb

_POLL_SECONDS = 0.1


class AsyncStream(AsyncIterator[Delta]):
    """A running request: iterate for its deltas, then read ``completion``.

    Closing it early aborts the request: by ``close()``, by leaving an ``async with`` block, by dropping the last
    reference, or by cancelling the task that waits for the next delta. With a resume window, a stream that is merely
    dropped runs on until the window ends.
    """

    def __init__(self, call: AsyncResumingCall) -> None:
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

    async def result(self) -> Completion:
        """Reads what is left of the stream and returns the finished request; raises as iterating does."""
        async for _ in self:
            pass
        return self.completion

    def close(self) -> None:
        """Aborts the request unless it has ended. May be called any number of times, from the event loop's thread."""
        self._call.cancel()

    async def __anext__(self) -> Delta:
        """The next delta.

        Raises:
            StopAsyncIteration: the request has ended; ``completion`` is there.
            BatonError: the request failed, its connection was lost for good, or the stream was closed.
        """
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                if (delta := self._folder.add(response)) is not None:
                    return delta
        except asyncio.CancelledError:
            if _cancelled_by_caller():
                self.close()
                raise
            raise RequestCancelledError("the stream was closed") from None
        except BaseException:
            self.close()
            raise
        self._folder.finished()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """Talks to Baton schedulers from an event loop; the asyncio twin of ``Client``, with the same errors.

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
        self._resume = resume
        self._targets = parse_targets(target)
        self.target = ",".join(self._targets)
        self._credentials = Credentials.from_environment() if credentials is None else credentials
        for one in self._targets:
            self._credentials.metadata(one)  # raises what is wrong now
        self._connected: Endpoints | None = None

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Runs a request to its end; see ``Client.generate``."""
        return await self.stream(prompt, timeout=timeout, **options).result()

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """Like ``generate``, but returns at once and yields the output as it comes. Needs a running event loop."""
        request = messages.generate_request(prompt, **options)
        return AsyncStream(AsyncResumingCall(self._endpoints, request, timeout, self._resume))

    async def abort(self, *request_ids: str, timeout: float | None = None) -> None:
        """Ends running requests; they finish with ``FinishReason.ABORT``. Unknown ids are ignored."""
        request = pb.AbortRequest(request_ids=request_ids)
        failures = []
        for endpoint in self._endpoints:  # who has the requests is not known here
            try:
                await _ask(endpoint, endpoint.stub.Abort, request, timeout)
            except UnavailableError as error:
                failures.append(error)
        if len(failures) == len(self._endpoints):
            raise failures[0]

    async def tokenize(
        self,
        prompt: str | Sequence[ChatMessage] | Sequence[Mapping[str, str]],
        *,
        timeout: float | None = None,
    ) -> tuple[int, ...]:
        """The token ids of a text or a conversation."""
        return tuple((await self._call("Tokenize", messages.tokenize_request(prompt), timeout)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """The text of token ids."""
        request = messages.detokenize_request(token_ids, skip_special_tokens)
        return str((await self._call("Detokenize", request, timeout)).text)

    async def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """The served model."""
        return messages.model_info(await self._call("GetModelInfo", pb.GetModelInfoRequest(), timeout))

    async def cluster_status(self, *, timeout: float | None = None) -> ClusterStatus:
        """The scheduler's view of its executors and queues."""
        request = pb.GetClusterStatusRequest()
        return messages.cluster_status(await self._call("GetClusterStatus", request, timeout))

    async def pause_executor(self, executor_id: str, *, timeout: float | None = None) -> None:
        """Gives an executor no new requests; those that run there go on.

        Raises:
            ExecutorNotFoundError: there is none of this name.
        """
        await self._command(executor_id, lambda stub: stub.PauseExecutor, admin_pb2.PauseExecutorRequest, timeout)

    async def resume_executor(self, executor_id: str, *, timeout: float | None = None) -> None:
        """Ends a pause, or a drain that is under way; raises as ``pause_executor``."""
        await self._command(executor_id, lambda stub: stub.ResumeExecutor, admin_pb2.ResumeExecutorRequest, timeout)

    async def drain_executor(self, executor_id: str, *, timeout: float | None = None) -> None:
        """Hands an executor's requests to others, then ends its process; returns at once, raises as
        ``pause_executor``."""
        await self._command(executor_id, lambda stub: stub.DrainExecutor, admin_pb2.DrainExecutorRequest, timeout)

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Returns once a scheduler serves: it is up and has an executor.

        Raises:
            UnavailableError: not within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        reason = ""
        while True:
            for endpoint in self._endpoints:
                try:
                    if await _ask(endpoint, endpoint.health, HEALTH_REQUEST, 1.0) == HEALTH_SERVING:
                        return
                    reason = "it has no executor that is ready"
                except (UnavailableError, DeadlineExceededError) as error:
                    reason = error.message
            if deadline is not None and time.monotonic() >= deadline:
                raise UnavailableError(f"{self.target} is not ready after {timeout:g} s: {reason}")
            await asyncio.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        """Ends the connection and every stream on it."""
        if self._connected is not None:
            await asyncio.gather(*self._connected.farewells, return_exceptions=True)
        for endpoint in self._connected or ():
            await endpoint.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _endpoints(self) -> Endpoints:
        # Not in the constructor: a channel belongs to the event loop it was made in.
        if self._connected is None:
            self._connected = Endpoints(self._targets, self._credentials, open_aio_channel)
        return self._connected

    async def _command(
        self, executor_id: str, method: Callable[[Any], Any], request: Callable[..., Any], timeout: float | None
    ) -> None:
        """Gives an order to whichever scheduler has the executor."""
        failure: BatonError | None = None
        for endpoint in self._endpoints:
            try:
                await _ask(endpoint, method(endpoint.admin), request(executor_id=executor_id), timeout)
            except ModelNotFoundError as error:
                failure = ExecutorNotFoundError(error.message, code=error.code)
            except UnavailableError as error:
                failure = failure or error
            else:
                return
        assert failure is not None
        raise failure

    async def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        """The answer of the first scheduler that can be reached."""
        unreachable: UnavailableError | None = None
        for endpoint in self._endpoints.preferred():
            try:
                result = await _ask(endpoint, getattr(endpoint.stub, method), request, timeout)
            except UnavailableError as error:
                unreachable = unreachable or error
                continue
            self._endpoints.mark_good(endpoint)
            return result
        assert unreachable is not None
        raise unreachable


async def _ask(endpoint: Endpoint, method: Any, request: Any, timeout: float | None) -> Any:
    try:
        return await method(request, timeout=timeout, metadata=endpoint.metadata)
    except grpc.RpcError as error:
        raise error_from_call(error, endpoint.target) from error
    except asyncio.CancelledError:
        if _cancelled_by_caller():
            raise
        raise RequestCancelledError("the client was closed") from None


def _cancelled_by_caller() -> bool:
    """Whether a CancelledError means that this task is being cancelled; grpc raises it for closed calls, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
