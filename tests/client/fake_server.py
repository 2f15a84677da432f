"""A baton.v1 server that says what a test tells it to, on an event loop in a thread of its own."""
# ruff: noqa: N802 - gRPC names the methods

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from baton_protos import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from baton_protos import generation_pb2 as pb

# A step of a scripted stream: send this, end the call with this status, or stay silent until it is cancelled.
SILENCE = "silence"
Step = pb.GenerateStreamResponse | grpc.Status | str
Answer = pb.GenerateResponse | grpc.Status | str


def start(**fields: Any) -> pb.GenerateStreamResponse:
    values = {"request_id": "r1", "seed": 7, "model_fingerprint": "f", "prompt_token_ids": [1, 2], "prompt_tokens": 2}
    return pb.GenerateStreamResponse(start=pb.StreamStart(**{**values, **fields}))


def chunk(
    token_index: int, token_ids: Sequence[int], text: str, text_offset: int, **fields: Any
) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(
        chunk=pb.StreamChunk(token_index=token_index, token_ids=token_ids, text=text, text_offset=text_offset, **fields)
    )


def end(
    completion_tokens: int, reason: pb.FinishReason = pb.FINISH_REASON_LENGTH, **fields: Any
) -> pb.GenerateStreamResponse:
    usage = pb.Usage(prompt_tokens=2, cached_tokens=1, completion_tokens=completion_tokens)
    return pb.GenerateStreamResponse(end=pb.StreamEnd(finish_reason=reason, usage=usage, **fields))


def failure(code: grpc.StatusCode, message: str, *details: Message) -> grpc.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return rpc_status.to_status(status)


class FakeServer:
    """Starts on ``with``.

    Attributes:
        stream: the steps of the next GenerateStream calls.
        script: if set, says the steps of each call instead.
        answer: what Generate answers, the status it ends with, SILENCE, or a function of the request that says.
        model: what GetModelInfo answers.
        most_running: most calls of Generate at a time.
        requests: what Generate and GenerateStream were asked.
        refusals: this many calls of Generate and GenerateStream end UNAVAILABLE before anything else.
        orders: what the operator has ordered of which executor; there is only ``executor-0``.
        cancelled: set when a call of Generate or GenerateStream is cancelled.
    """

    def __init__(self) -> None:
        self.stream: list[Step] = []
        self.script: Callable[[pb.GenerateRequest], Sequence[Step]] | None = None
        self.answer: Answer | Callable[[pb.GenerateRequest], Answer] = pb.GenerateResponse()
        self.model = pb.GetModelInfoResponse(model="fake", vocab_size=512, eos_token_ids=[3], architectures=["Fake"])
        self.running = self.most_running = 0
        self.requests: list[pb.GenerateRequest] = []
        self.aborted: list[str] = []
        self.orders: list[tuple[str, str]] = []
        self.refusals = 0
        self.health = health_pb2.HealthCheckResponse.SERVING
        self.cancelled = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: Any = None
        self.address = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self.stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def stop(self) -> None:
        await self._server.stop(0)

    def _run(self, work: Callable[[], Any]) -> None:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work(), self._loop)
        future.result(10)

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        generation_pb2_grpc.add_GenerationServicer_to_server(_Servicer(self), self._server)
        admin_pb2_grpc.add_AdminServicer_to_server(_Admin(self), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(_Health(self), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()


class _Servicer(generation_pb2_grpc.GenerationServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        await self._begin(request, context)
        self._fake.running += 1
        self._fake.most_running = max(self._fake.running, self._fake.most_running)
        try:
            return await self._answer(request, context)
        except asyncio.CancelledError:
            self._fake.cancelled.set()
            raise
        finally:
            self._fake.running -= 1

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> None:
        await self._begin(request, context)
        try:
            for step in self._fake.script(request) if self._fake.script is not None else self._fake.stream:
                if isinstance(step, pb.GenerateStreamResponse):
                    await context.write(step)
                elif step == SILENCE:
                    await asyncio.sleep(60)
                else:
                    await context.abort_with_status(step)
        except asyncio.CancelledError:
            self._fake.cancelled.set()
            raise

    async def _answer(self, request: pb.GenerateRequest, context: Any) -> Any:
        answer = self._fake.answer(request) if callable(self._fake.answer) else self._fake.answer
        await asyncio.sleep(60 if answer == SILENCE else 0.01)
        if isinstance(answer, grpc.Status):
            await context.abort_with_status(answer)
        return answer

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self._fake.aborted.extend(request.request_ids)
        return pb.AbortResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        texts = [request.text] if request.WhichOneof("prompt") == "text" else [m.content for m in request.chat.messages]
        return pb.TokenizeResponse(token_ids=[ord(letter) for text in texts for letter in text])

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text="".join(chr(token) for token in request.token_ids))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        return self._fake.model

    async def GetClusterStatus(self, request: pb.GetClusterStatusRequest, context: Any) -> pb.GetClusterStatusResponse:
        executor = pb.ExecutorStatus(
            executor_id="executor-0",
            epoch=1,
            device="cpu",
            max_rows=256,
            total_blocks=100,
            used_blocks=25,
            free_blocks=75,
            stale_tokens=7,
            audited_tokens=128,
            audit_mismatches=2,
            handovers=5,
        )
        return pb.GetClusterStatusResponse(
            scheduler_id="s", queued_requests=4, oldest_queued_us=2_500_000, executors=[executor]
        )

    async def _begin(self, request: pb.GenerateRequest, context: Any) -> None:
        self._fake.requests.append(request)
        if self._fake.refusals:
            self._fake.refusals -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "try again")


class _Admin(admin_pb2_grpc.AdminServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    async def PauseExecutor(
        self, request: admin_pb2.PauseExecutorRequest, context: Any
    ) -> admin_pb2.PauseExecutorResponse:
        await self._order("pause", request.executor_id, context)
        return admin_pb2.PauseExecutorResponse()

    async def ResumeExecutor(
        self, request: admin_pb2.ResumeExecutorRequest, context: Any
    ) -> admin_pb2.ResumeExecutorResponse:
        await self._order("resume", request.executor_id, context)
        return admin_pb2.ResumeExecutorResponse()

    async def DrainExecutor(
        self, request: admin_pb2.DrainExecutorRequest, context: Any
    ) -> admin_pb2.DrainExecutorResponse:
        await self._order("drain", request.executor_id, context)
        return admin_pb2.DrainExecutorResponse()

    async def _order(self, order: str, executor_id: str, context: Any) -> None:
        if executor_id != "executor-0":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no executor {executor_id!r}")
        self._fake.orders.append((order, executor_id))


class _Health(health_pb2_grpc.HealthServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=self._fake.health)
