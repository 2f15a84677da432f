"""The vllm.grpc.engine.VllmEngine service."""
# ruff: noqa: N802 - gRPC names the methods

import asyncio
import time
from pathlib import Path

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

from scheduler_service.api.call_errors import CallErrors
from scheduler_service.api.checkpoint import Checkpoint
from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError
from scheduler_service.api.intake import Intake
from scheduler_service.api.outlet import Context, Outlet, let_tokens_gather
from scheduler_service.api.vllm_engine import wire
from scheduler_service.api.vllm_engine.tokenizer_archive import TokenizerArchive, pack_tokenizer

SERVICE = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name

_STATUS_TIMEOUT = 2.0  # seconds
_TOKENIZER_CHUNK_BYTES = 64 * 1024
# Gateways bring no credentials.
_NO_TENANT = ""


class VllmEngineServicer(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
    """One engine, as gateways see it. What is not here ends UNIMPLEMENTED, and gateways do without."""

    def __init__(
        self, intake: Intake, engine: EngineClient, checkpoint: Checkpoint, folder: Path, model: str, patience: float
    ) -> None:
        """Create a servicer.

        Args:
            intake: where requests go.
            engine: is asked about loads and limits.
            checkpoint: what ``folder`` holds.
            folder: checkpoint directory, whose tokenizer gateways fetch.
            model: its name for callers.
            patience: how many seconds a client may leave a stream unread.
        """
        self._intake = intake
        self._engine = engine
        self._checkpoint = checkpoint
        self._folder = folder.resolve()
        self._model = model
        self._patience = patience
        self._started_at = time.time()
        self._archive: TokenizerArchive | None = None
        self._packing = asyncio.Lock()

    async def Generate(self, request: vllm_engine_pb2.GenerateRequest, context: Context) -> None:
        async with CallErrors(context):
            decoded = wire.decode_request(request)
            async with (
                self._intake.run(decoded, tenant=_NO_TENANT, time_remaining=context.time_remaining()) as running,
                Outlet(context, self._patience) as outlet,
            ):
                with_prompt = decoded.output.prompt_logprobs is not None
                prompt_token_ids = running.prompt_token_ids() if with_prompt else []
                if not request.stream:
                    for delta in await running.take_all():
                        if delta.ending is not None:
                            await outlet.write(wire.encode_whole(delta, delta.ending, prompt_token_ids))
                    return
                while not running.ended:
                    delta = await running.take()
                    for message in wire.encode_delta(delta, prompt_token_ids, running.prompt_length):
                        await outlet.write(message)
                    if delta.ending is None:
                        await let_tokens_gather(self._intake.num_live)

    async def Abort(self, request: vllm_engine_pb2.AbortRequest, context: Context) -> vllm_engine_pb2.AbortResponse:
        async with CallErrors(context):
            self._intake.abort(_NO_TENANT, request.request_ids)
            return vllm_engine_pb2.AbortResponse()

    async def HealthCheck(
        self, request: vllm_engine_pb2.HealthCheckRequest, context: Context
    ) -> vllm_engine_pb2.HealthCheckResponse:
        ready = self._engine.limits.ready_executors > 0
        return vllm_engine_pb2.HealthCheckResponse(healthy=ready, message="" if ready else "no executor is ready")

    async def GetModelInfo(
        self, request: vllm_engine_pb2.GetModelInfoRequest, context: Context
    ) -> vllm_engine_pb2.GetModelInfoResponse:
        return wire.encode_model_info(self._checkpoint, self._folder, self._model, self._engine.limits)

    async def GetServerInfo(
        self, request: vllm_engine_pb2.GetServerInfoRequest, context: Context
    ) -> vllm_engine_pb2.GetServerInfoResponse:
        return vllm_engine_pb2.GetServerInfoResponse(
            active_requests=self._intake.num_live,
            uptime_seconds=time.time() - self._started_at,
            server_type="baton",
            data_parallel_size=1,
            model_dtype=self._engine.limits.dtype,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(
        self, request: vllm_engine_pb2.GetLoadsRequest, context: Context
    ) -> vllm_engine_pb2.GetLoadsResponse:
        async with CallErrors(context):
            return wire.encode_loads(await self._engine.cluster_status(_STATUS_TIMEOUT))

    async def GetTokenizer(self, request: common_pb2.GetTokenizerRequest, context: Context) -> None:
        async with CallErrors(context):
            archive = await self._tokenizer()
            async with Outlet(context, self._patience) as outlet:
                for chunk in wire.encode_tokenizer(archive.data, archive.sha256, _TOKENIZER_CHUNK_BYTES):
                    await outlet.write(chunk)

    async def _tokenizer(self) -> TokenizerArchive:
        async with self._packing:
            if self._archive is None:
                try:
                    self._archive = await asyncio.to_thread(pack_tokenizer, self._folder)
                except (OSError, ValueError) as error:
                    raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, "", str(error)) from error
            return self._archive
