"""The baton.v1.Admin service."""
# ruff: noqa: N802 - gRPC names the methods

import grpc

from baton_protos import admin_pb2 as pb
from baton_protos import admin_pb2_grpc
from scheduler_service.api.call_errors import CallErrors
from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError
from scheduler_service.api.outlet import Context
from scheduler_service.api.wire import ExecutorAction

_TIMEOUT = 2.0  # seconds


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """What operators speak; documentation of each method is in admin.proto."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def PauseExecutor(self, request: pb.PauseExecutorRequest, context: Context) -> pb.PauseExecutorResponse:
        await self._command(request.executor_id, ExecutorAction.PAUSE, context)
        return pb.PauseExecutorResponse()

    async def ResumeExecutor(self, request: pb.ResumeExecutorRequest, context: Context) -> pb.ResumeExecutorResponse:
        await self._command(request.executor_id, ExecutorAction.RESUME, context)
        return pb.ResumeExecutorResponse()

    async def DrainExecutor(self, request: pb.DrainExecutorRequest, context: Context) -> pb.DrainExecutorResponse:
        await self._command(request.executor_id, ExecutorAction.DRAIN, context)
        return pb.DrainExecutorResponse()

    async def _command(self, executor_id: str, action: ExecutorAction, context: Context) -> None:
        async with CallErrors(context):
            if not await self._engine.command(executor_id, action, _TIMEOUT):
                message = f"there is no executor {executor_id[:100]!r}"
                raise RequestError(grpc.StatusCode.NOT_FOUND, "", message)
