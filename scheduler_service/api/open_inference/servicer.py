"""The inference.GRPCInferenceService service."""
# ruff: noqa: N802 - gRPC names the methods

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from baton_protos import open_inference_pb2 as pb
from baton_protos import open_inference_pb2_grpc
from scheduler_service.api.auth import tenant_of
from scheduler_service.api.call_errors import CallErrors, describe_bug
from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError, invalid
from scheduler_service.api.intake import Intake
from scheduler_service.api.open_inference import wire
from scheduler_service.api.open_inference.inference import Answers, Inference
from scheduler_service.api.open_inference.statistics import Statistics
from scheduler_service.api.outlet import Context, Outlet, let_tokens_gather

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

_EXTENSIONS = ("model_configuration", "statistics")
# Inferences of one stream that run side by side; further ones wait unread.
_MAX_CONCURRENT = 128

_Write = Callable[[pb.ModelStreamInferResponse], Awaitable[None]]


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """One model in one version; documentation of each method is in open_inference.proto."""

    def __init__(self, intake: Intake, engine: EngineClient, model: str, patience: float) -> None:
        """Create a servicer; ``patience`` is how many seconds a client may leave a stream unread."""
        self._intake = intake
        self._engine = engine
        self._model = model
        self._patience = patience
        self._statistics = Statistics()
        self._readers: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Read nothing more from streams, so that those without inferences end and do not hold up a shutdown."""
        for reader in list(self._readers):
            reader.cancel()

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self._ready and self._is_served(request.name, request.version))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=wire.PLATFORM, extensions=_EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        async with CallErrors(context):
            self._check_model(request.name, request.version)
            return wire.encode_metadata(self._model)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        async with CallErrors(context):
            self._check_model(request.name, request.version)
            return wire.encode_config(self._model)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        async with CallErrors(context):
            self._check_model(request.name or self._model, request.version)
            return wire.encode_statistics(self._model, self._statistics)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        async with CallErrors(context):
            with self._statistics.watch():
                inference = self._decode(request)
                if inference.stream:
                    raise invalid("stream", "only ModelStreamInfer can stream")
                remaining = context.time_remaining()
                run = self._intake.run(inference.request, tenant=tenant_of(context), time_remaining=remaining)
                async with run as running:
                    answers = Answers(inference, running.prompt_length)
                    return wire.encode_answer(inference, self._model, answers.whole(await running.take_all()))

    async def ModelStreamInfer(self, messages: AsyncIterator[pb.ModelInferRequest], context: Context) -> None:
        tenant = tenant_of(context)
        writing = asyncio.Lock()
        async with CallErrors(context), Outlet(context, self._patience) as outlet, asyncio.TaskGroup() as group:

            async def write(message: pb.ModelStreamInferResponse) -> None:
                async with writing:
                    await outlet.write(message)

            async def read() -> None:
                slots = asyncio.Semaphore(_MAX_CONCURRENT)
                async for message in messages:
                    await slots.acquire()
                    task = group.create_task(self._serve(message, tenant, context, write))
                    task.add_done_callback(lambda _: slots.release())

            reader = group.create_task(read())
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)

    async def _serve(self, message: pb.ModelInferRequest, tenant: str, context: Context, write: _Write) -> None:
        """Run one inference of a stream; whatever goes wrong with it ends nothing but itself."""
        try:
            with self._statistics.watch():
                await self._stream(self._decode(message), tenant, context.time_remaining(), write)
        except ConnectionError:
            return  # there is nobody left to tell; the call is about to be cancelled
        except RequestError as error:
            problem = wire.describe(error)
        except Exception as error:
            problem = describe_bug(error)
        else:
            return
        try:
            await write(wire.encode_stream_error(message.id, self._model, problem))
        except ConnectionError:
            return

    async def _stream(self, inference: Inference, tenant: str, time_remaining: float | None, write: _Write) -> None:
        async with self._intake.run(inference.request, tenant=tenant, time_remaining=time_remaining) as running:
            answers = Answers(inference, running.prompt_length)
            if not inference.stream:
                answer = answers.whole(await running.take_all())
                await write(wire.encode_streamed(inference, self._model, answer))
                return
            while not running.ended:
                delta = await running.take()
                if delta.has_content or delta.ending is not None:
                    answer = answers.piece(delta, final=running.ended)
                    await write(wire.encode_streamed(inference, self._model, answer))
                if delta.ending is None:
                    await let_tokens_gather(self._intake.num_live)

    def _decode(self, message: pb.ModelInferRequest) -> Inference:
        if message.model_version not in ("", wire.VERSION):
            raise RequestError(
                grpc.StatusCode.NOT_FOUND, "model_version", f"the served model has only version {wire.VERSION}"
            )
        return wire.decode_inference(message)

    @property
    def _ready(self) -> bool:
        return self._engine.limits.ready_executors > 0

    def _is_served(self, name: str, version: str) -> bool:
        return name == self._model and version in ("", wire.VERSION)

    def _check_model(self, name: str, version: str) -> None:
        if not self._is_served(name, version):
            message = f"the served model is {self._model!r}, in version {wire.VERSION}"
            raise RequestError(grpc.StatusCode.NOT_FOUND, "name", message)
