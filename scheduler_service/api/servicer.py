"""The baton.v1.Generation service."""
# ruff: noqa: N802 - gRPC names the methods

from contextlib import AbstractAsyncContextManager

from baton_protos import generation_pb2 as pb
from baton_protos import generation_pb2_grpc
from scheduler_service.api import generation_wire as wire
from scheduler_service.api.auth import tenant_of
from scheduler_service.api.call_errors import CallErrors
from scheduler_service.api.checkpoint import Checkpoint
from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.intake import Intake
from scheduler_service.api.outlet import Context, Outlet, let_tokens_gather
from scheduler_service.api.request import GenerationRequest
from scheduler_service.api.running_request import RunningRequest

_STATUS_TIMEOUT = 2.0  # seconds


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """What callers speak; documentation of each method is in generation.proto."""

    def __init__(
        self, intake: Intake, engine: EngineClient, checkpoint: Checkpoint, model: str, patience: float
    ) -> None:
        """Create a servicer; ``patience`` is how many seconds a client may leave a stream unread."""
        self._intake = intake
        self._engine = engine
        self._checkpoint = checkpoint
        self._model = model
        self._patience = patience

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with CallErrors(context):
            decoded = wire.decode_request(request)
            async with self._run(decoded, context) as running:
                samples = await running.take_all()
                return wire.encode_response(running, samples, echo_prompt=decoded.output.prompt_token_ids)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        async with CallErrors(context):
            decoded = wire.decode_request(request)
            # Written from this frame, not yielded: a cancelled call must reach the clean-up at once.
            async with self._run(decoded, context) as running, Outlet(context, self._patience) as outlet:
                await outlet.write(wire.encode_start(running, echo_prompt=decoded.output.prompt_token_ids))
                while not running.ended:
                    delta = await running.take()
                    for message in wire.encode_delta(delta):
                        await outlet.write(message)
                    if delta.ending is None:
                        await let_tokens_gather(self._intake.num_live)

    def _run(self, request: GenerationRequest, context: Context) -> AbstractAsyncContextManager[RunningRequest]:
        remaining = context.time_remaining()
        return self._intake.run(request, tenant=tenant_of(context), time_remaining=remaining)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        async with CallErrors(context):
            self._intake.abort(tenant_of(context), request.request_ids)
            return pb.AbortResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with CallErrors(context):
            return pb.TokenizeResponse(token_ids=await self._intake.tokenize(wire.decode_prompt(request)))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with CallErrors(context):
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
        async with CallErrors(context):
            response = (await self._engine.cluster_status(_STATUS_TIMEOUT)).response
            response.scheduler_id = self._engine.limits.scheduler_id
            return response
