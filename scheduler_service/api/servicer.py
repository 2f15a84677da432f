"""The baton.v1.Generation service."""
# ruff: noqa: N802 - gRPC names the methods

import asyncio
import logging
import secrets
from types import TracebackType
from typing import Any, TypeAlias

import grpc

from baton_protos import generation_pb2 as pb
from baton_protos import generation_pb2_grpc
from scheduler_service.api import generation_wire as wire
from scheduler_service.api.checkpoint import Checkpoint
from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError
from scheduler_service.api.intake import Intake

_log = logging.getLogger("baton.api")

_STATUS_TIMEOUT = 2.0  # seconds
_MESSAGE_SECONDS = 100e-6  # what a message costs both ends, generously
_LEAST_PAUSE_SECONDS = 2e-3  # with up to 20 streams every token goes out at once

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """What callers speak; documentation of each method is in generation.proto."""

    def __init__(self, intake: Intake, engine: EngineClient, checkpoint: Checkpoint, model: str) -> None:
        self._intake = intake
        self._engine = engine
        self._checkpoint = checkpoint
        self._model = model

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with _Errors(context):
            decoded = wire.decode_request(request)
            async with self._intake.run(decoded) as running:
                delta = await running.take_all()
                assert delta.finish is not None
                return wire.encode_response(running, delta, delta.finish, echo_prompt=decoded.echo_prompt)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        async with _Errors(context):
            decoded = wire.decode_request(request)
            # Written from this frame, not yielded: a cancelled call must reach the clean-up at once.
            async with self._intake.run(decoded) as running:
                await context.write(wire.encode_start(running, echo_prompt=decoded.echo_prompt))
                finish = None
                while finish is None:
                    delta = await running.take()
                    if delta.token_ids or delta.text:
                        await context.write(wire.encode_chunk(delta))
                    finish = delta.finish
                    if finish is None:
                        await self._let_tokens_gather()
                await context.write(wire.encode_end(running, finish))

    async def _let_tokens_gather(self) -> None:
        """Space out the messages of each stream while many streams share this process.

        Writing returns once gRPC has buffered a message, so a reader that lags does not hold the writer back: without
        this, a busy process would send ever more messages of one token and fall behind.
        """
        pause = self._intake.num_live * _MESSAGE_SECONDS
        if pause > _LEAST_PAUSE_SECONDS:
            await asyncio.sleep(pause)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        async with _Errors(context):
            unknown = self._intake.abort(request.request_ids)
            if unknown:
                self._engine.forward_abort(unknown)
            return pb.AbortResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with _Errors(context):
            return pb.TokenizeResponse(token_ids=await self._intake.tokenize(wire.decode_prompt(request)))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with _Errors(context):
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            text = await self._intake.detokenize(request.token_ids, skip_special_tokens=skip)
            return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        limits, checkpoint = self._engine.limits, self._checkpoint
        return pb.GetModelInfoResponse(
            model=self._model,
            model_fingerprint=limits.model_fingerprint,
            architectures=checkpoint.architectures,
            dtype=limits.dtype,
            vocab_size=limits.vocab_size or checkpoint.vocab_size,
            max_total_tokens=limits.max_total_tokens,
            eos_token_ids=checkpoint.eos_token_ids,
            has_chat_template=checkpoint.chat_template is not None,
        )

    async def GetClusterStatus(
        self, request: pb.GetClusterStatusRequest, context: Context
    ) -> pb.GetClusterStatusResponse:
        async with _Errors(context):
            response = (await self._engine.cluster_status(_STATUS_TIMEOUT)).response
            response.scheduler_id = self._engine.limits.scheduler_id
            return response


class _Errors:
    """Ends a call with the right status when its handler raises."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, RequestError):
            await self._context.abort_with_status(wire.encode_error(error))
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
            reference = secrets.token_hex(4)
            _log.error("unexpected error, reference %s", reference, exc_info=error)
            await self._context.abort(grpc.StatusCode.INTERNAL, f"internal error, reference {reference}")
