"""What callers do wrong fills no log."""

import asyncio
import logging
from typing import Any

import grpc
import pytest

from scheduler_service.api.grpc_log import log_callers_faults_once


class _Failing(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Every call fails once its caller has left."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()

    def service(self, _: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._fail)

    async def _fail(self, _: bytes, __: Any) -> bytes:
        self.has_begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("nobody will hear of this")


async def test_nobody_left_to_tell(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
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
        with caplog.at_level(logging.ERROR):
            while "left" not in caplog.text:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
    await server.stop(0)
    assert "Traceback" not in capfd.readouterr().err
