"""Callers with and without tokens before a real api server."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from baton_protos import admin_pb2, generation_pb2_grpc, open_inference_pb2
from baton_protos import generation_pb2 as pb
from scheduler_service.api.auth import OPERATOR, TokenFile, TokenInterceptor, tenant_of
from scheduler_service.api.grpc_log import log_callers_faults_once
from scheduler_service.tokens import TokenFileError
from tests.api.conftest import Serve, until
from tests.api.fake_engine import FakeEngine

METHODS = [
    (f"/{service.full_name}/{method.name}", method.server_streaming)
    for file in (pb.DESCRIPTOR, admin_pb2.DESCRIPTOR, open_inference_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]
LONG = pb.GenerateRequest(
    request_id="mine",
    token_ids=pb.TokenIds(ids=[5, 6]),
    stop=pb.StopConditions(max_tokens=900, ignore_eos=True),
)
BAD_HEADERS: list[tuple[tuple[str, str], ...]] = [
    (),
    (("authorization", ""),),
    (("authorization", "Bearer"),),
    (("authorization", "Bearer "),),
    (("authorization", "Bearer wrong-wrong-wrong-wrong"),),
    (("authorization", "Basic YWNtZTp4"),),
    (("x-authorization", "TOKEN"),),
    (("authorization", "TOKEN"),),
    (("authorization", "Bearer TOKEN x"),),
    (("authorization", "Bearer tOKEN"),),
]


def bearer(keys: Path, tenant: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {(keys / f'token-{tenant}').read_text().strip()}"),)


async def rest_of(call: Any) -> tuple[int, pb.FinishReason]:
    """Reads a stream to its end: how many tokens came, and why it ended."""
    tokens = 0
    while (message := await call.read()) is not grpc.aio.EOF:
        tokens += len(message.chunk.token_ids)
        end = message.end
    return tokens, end.finish_reason


async def status_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    code: grpc.StatusCode = caught.value.code()
    return code


@pytest.mark.parametrize(("method", "streams"), METHODS)
async def test_every_method_asks_for_a_token(serve: Serve, keys: Path, method: str, streams: bool) -> None:
    served = await serve(tokens=keys / "tokens")
    token = (keys / "token-acme").read_text().strip()
    for header in BAD_HEADERS:
        metadata = tuple((key, value.replace("TOKEN", token)) for key, value in header)
        if streams:
            call = served.channel.unary_stream(method)(b"", metadata=metadata).read()
        else:
            call = served.channel.unary_unary(method)(b"", metadata=metadata)
        assert await status_of(call) is grpc.StatusCode.UNAUTHENTICATED, header


async def test_strangers_are_refused_before_they_have_sent_anything(serve: Serve, keys: Path) -> None:
    served = await serve(tokens=keys / "tokens")
    call = served.channel.stream_stream("/baton.v1.Generation/GenerateStream")()
    assert await asyncio.wait_for(status_of(call.read()), 20) is grpc.StatusCode.UNAUTHENTICATED
    unknown = served.channel.unary_unary("/baton.v1.Generation/Nonsense")(b"")
    assert await status_of(unknown) is grpc.StatusCode.UNAUTHENTICATED


async def test_a_valid_token_is_served(serve: Serve, keys: Path) -> None:
    served = await serve(tokens=keys / "tokens")
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), stop=pb.StopConditions(max_tokens=3))
    for scheme in ("Bearer", "bearer"):
        metadata = ((key, value.replace("Bearer", scheme)) for key, value in bearer(keys, "acme"))
        answer = await served.stub.Generate(request, metadata=tuple(metadata))
        assert len(answer.samples[0].token_ids) == 3


async def test_health_and_reflection_need_no_token(serve: Serve, keys: Path) -> None:
    served = await serve(tokens=keys / "tokens")
    check = served.channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    assert (await check(b"")).status == health_pb2.HealthCheckResponse.SERVING
    reflect = served.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await reflect.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert "baton.v1.Generation" in str(await reflect.read())
    reflect.cancel()


async def test_tenants_neither_see_nor_end_each_others_requests(serve: Serve, keys: Path, engine: FakeEngine) -> None:
    served = await serve(tokens=keys / "tokens")
    acme, rival = bearer(keys, "acme"), bearer(keys, "rival")
    streams = {}
    for tenant, metadata in (("acme", acme), ("rival", rival)):  # the same name twice, and neither is in the way
        streams[tenant] = served.stub.GenerateStream(LONG, metadata=metadata)
        assert (await streams[tenant].read()).start.request_id == "mine"
    twin = served.stub.GenerateStream(LONG, metadata=acme)
    assert await status_of(twin.read()) is grpc.StatusCode.ALREADY_EXISTS
    await served.stub.Abort(pb.AbortRequest(request_ids=["mine"]), metadata=rival)
    assert (await rest_of(streams["rival"]))[1] == pb.FINISH_REASON_ABORT
    assert len(engine.aborted) == 1
    assert await rest_of(streams["acme"]) == (900, pb.FINISH_REASON_LENGTH)


async def test_aborts_through_other_processes_keep_to_the_tenant(serve: Serve, keys: Path, engine: FakeEngine) -> None:
    engine.step_seconds = 0.01
    first, second = [await serve(index=index, tokens=keys / "tokens") for index in range(2)]
    acme, rival = bearer(keys, "acme"), bearer(keys, "rival")
    stream = first.stub.GenerateStream(LONG, metadata=acme)
    await stream.read()
    marker = first.stub.GenerateStream(LONG, metadata=rival)
    await marker.read()
    await second.stub.Abort(pb.AbortRequest(request_ids=["mine"]), metadata=rival)
    assert (await rest_of(marker))[1] == pb.FINISH_REASON_ABORT  # so the abort has passed through the first process
    assert len(engine.aborted) == 1
    await second.stub.Abort(pb.AbortRequest(request_ids=["mine"]), metadata=acme)
    assert (await rest_of(stream))[1] == pb.FINISH_REASON_ABORT


async def test_the_tenant_of_a_call(tmp_path: Path) -> None:
    """Through the real interceptor, in a server of its own: what handlers are told, and who may do what."""
    file = tmp_path / "tokens"
    file.write_text(f"acme:acme-token-0123456789\n{OPERATOR}:operator-token-0123456789\n")

    async def tell(request: bytes, context: Any) -> bytes:
        return tenant_of(context).encode()

    async def stream(request: bytes, context: Any) -> None:
        await asyncio.sleep(0.01)  # other calls come in between
        await context.write(await tell(request, context))

    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(tell),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server(interceptors=[TokenInterceptor(TokenFile(file))])
    for service in ("any.Service", "baton.v1.Admin"):
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    acme = (("authorization", "Bearer acme-token-0123456789"),)
    operator = (("authorization", "Bearer operator-token-0123456789"),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        unary, stream_call = channel.unary_unary("/any.Service/Unary"), channel.unary_stream("/any.Service/Stream")
        assert await unary(b"", metadata=acme) == b"acme"
        calls = [stream_call(b"", metadata=(acme, operator)[i % 2]).read() for i in range(20)]
        answers = await asyncio.gather(*calls)
        assert answers == [b"acme", b"operator"] * 10
        admin = channel.unary_unary("/baton.v1.Admin/Unary")
        assert await admin(b"", metadata=operator) == b"operator"
        assert await status_of(admin(b"", metadata=acme)) is grpc.StatusCode.PERMISSION_DENIED
        assert await status_of(admin(b"")) is grpc.StatusCode.UNAUTHENTICATED
    await server.stop(0)


async def test_a_request_cannot_claim_another_tenant(serve: Serve, keys: Path) -> None:
    served = await serve(tokens=keys / "tokens")
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), stop=pb.StopConditions(max_tokens=1), tenant="rival")
    call = served.stub.Generate(request, metadata=bearer(keys, "acme"))
    assert await status_of(call) is grpc.StatusCode.PERMISSION_DENIED
    assert (await served.stub.Generate(request, metadata=bearer(keys, "rival"))).samples


async def test_a_bad_token_file_stops_the_start(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(TokenFileError):
        await serve(tokens=tmp_path / "nothing")


async def test_bytes_that_are_no_message_are_logged_once_in_a_line(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Found by fuzzing: a traceback for each would fill a disk."""
    log_callers_faults_once()
    served = await serve()
    call = served.channel.unary_unary("/baton.v1.Generation/Generate")
    for _ in range(5):
        assert await status_of(call(b"\xff")) in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
    told = [record for record in caplog.records if record.name.startswith("grpc")]
    assert len(told) == 1
    assert told[0].exc_info is None
    assert "no message" in told[0].getMessage()


async def test_large_metadata_is_refused_and_the_server_goes_on(serve: Serve) -> None:
    served = await serve()
    info = served.channel.unary_unary("/baton.v1.Generation/GetModelInfo")
    assert await info(b"", metadata=(("x-small", "x" * 4_000),))
    code = await status_of(info(b"", metadata=(("x-large", "x" * 64_000),)))
    assert code in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}
    assert await info(b"")


async def test_large_messages_are_refused_and_streams_go_on(serve: Serve) -> None:
    served = await serve()
    stub: generation_pb2_grpc.GenerationStub = served.stub
    stream = stub.GenerateStream(LONG)
    await stream.read()
    assert await status_of(stub.Tokenize(pb.TokenizeRequest(text="x" * 34_000_000))) is (
        grpc.StatusCode.RESOURCE_EXHAUSTED
    )
    assert await rest_of(stream) == (900, pb.FINISH_REASON_LENGTH)
    await until(lambda: served.server._intake.num_live == 0)
