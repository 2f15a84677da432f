"""What callers do wrong fills no log."""

import asyncio
from typing import Any

import grpc
import pytest

from scheduler_service.api.grpc_log import log_callers_faults_once


class _Failing(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Every call fails once its caller has left."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.has_failed = asyncio.Event()

    def service(self, _: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._fail)

    async def _fail(self, _: bytes, __: Any) -> bytes:
        self.has_begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.has_failed.set()
            raise ValueError("nobody will hear of this")


async def test_nobody_left_to_tell(capfd: pytest.CaptureFixture[str]) -> None:
    log_callers_faults_once()
    server = grpc.aio.server()
    failing = _Failing()
    server.add_generic_rpc_handlers((failing,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/any/thing")(b"")
        await failing.has_begun.wait()
        call.cancel()
        await failing.has_failed.wait()
        await asyncio.sleep(0.2)  # gRPC tries to tell the caller, and prints at once that it cannot
    await server.stop(0)
    assert "Traceback" not in capfd.readouterr().err
