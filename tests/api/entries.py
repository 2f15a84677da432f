"""The ways into a scheduler, for tests that hold for all of them.

A dialect adds its own entry: a coroutine that sends ``request`` in its own words, and tells how it was refused. What
it has no words for it answers with None.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from baton import AsyncClient, BatonError, Client, GenerateOptions, InvalidRequestError, Prompt
from baton.options import PATHS
from baton_protos import generation_pb2 as pb
from baton_protos import open_inference_pb2_grpc

from . import dialects
from .conftest import Served

# The gRPC status, and the field that is to blame.
Refusal = tuple[str, str]
Entry = Callable[[Served, pb.GenerateRequest], Awaitable[Refusal | None]]

_SECONDS = {"queue_timeout", "resume_window", "deadline"}


async def unary(served: Served, request: pb.GenerateRequest) -> Refusal | None:
    try:
        await served.stub.Generate(request)
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    return ("OK", "")


async def stream(served: Served, request: pb.GenerateRequest) -> Refusal | None:
    try:
        async for _ in served.stub.GenerateStream(request):
            pass
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    return ("OK", "")


async def sdk(served: Served, request: pb.GenerateRequest) -> Refusal | None:
    if (said := as_options(request)) is None:
        return None
    prompt, options = said

    def generate() -> Refusal:
        with Client(f"127.0.0.1:{served.server.port}") as client:
            try:
                client.generate(prompt, timeout=30, **options)
            except BatonError as error:
                return error.code or "INVALID_ARGUMENT", error.field if isinstance(error, InvalidRequestError) else ""
        return ("OK", "")

    return await asyncio.to_thread(generate)


async def async_sdk(served: Served, request: pb.GenerateRequest) -> Refusal | None:
    if (said := as_options(request)) is None:
        return None
    prompt, options = said
    async with AsyncClient(f"127.0.0.1:{served.server.port}") as client:
        try:
            await client.stream(prompt, timeout=30, **options).result()
        except BatonError as error:
            return error.code or "INVALID_ARGUMENT", error.field if isinstance(error, InvalidRequestError) else ""
    return ("OK", "")


async def vllm_engine(served: Served, request: pb.GenerateRequest) -> Refusal | None:
    if (said := dialects.as_vllm(request)) is None:
        return None
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.gateway_port}") as channel:
        try:
            async for _ in vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(said):
                pass
        except grpc.aio.AioRpcError as error:
            return refusal(error)
    return ("OK", "")


async def model_infer(served: Served, request: pb.GenerateRequest) -> Refusal | None:
    if (said := dialects.as_inference(request, raw=False)) is None:
        return None
    try:
        await open_inference_pb2_grpc.GRPCInferenceServiceStub(served.channel).ModelInfer(said)
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    return ("OK", "")


async def model_stream_infer(served: Served, request: pb.GenerateRequest) -> Refusal | None:
    if (said := dialects.as_inference(request, raw=True)) is None:
        return None
    call = open_inference_pb2_grpc.GRPCInferenceServiceStub(served.channel).ModelStreamInfer(iter([said]))
    answers = [answer async for answer in call]
    # A text is all that it has for an error.
    field, _, message = answers[-1].error_message.partition(": ")
    return ("INVALID_ARGUMENT", field) if message else ("OK", "")


ENTRIES: Mapping[str, Entry] = {
    "unary": unary,
    "stream": stream,
    "sdk": sdk,
    "async sdk": async_sdk,
    "vllm engine": vllm_engine,
    "model infer": model_infer,
    "model stream infer": model_stream_infer,
}


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """The first field in the error's BadRequest."""
    status = rpc_status.from_call(error)
    bad = error_details_pb2.BadRequest()
    for detail in status.details if status else ():
        if detail.Unpack(bad):
            return error.code().name, bad.field_violations[0].field
    return error.code().name, ""


def as_options(request: pb.GenerateRequest) -> tuple[Prompt, GenerateOptions] | None:
    """The request in the words of the SDK; None if it has none for it."""
    kind = request.WhichOneof("prompt")
    if kind is None or request.resume or request.sampling.HasField("structured"):
        return None
    prompt: Any = {
        "text": lambda: request.text,
        "token_ids": lambda: list(request.token_ids.ids),
        "chat": lambda: [{"role": one.role, "content": one.content} for one in request.chat.messages],
    }[kind]()
    options: dict[str, Any] = {}
    for name, path in PATHS.items():
        message: Any = request
        *parents, last = path.split(".")
        for parent in parents:
            message = getattr(message, parent)
        value = getattr(message, last)
        field = message.DESCRIPTOR.fields_by_name[last]
        if field.has_presence and not message.HasField(last):
            continue
        if name == "processed_logprobs":
            if value not in (pb.LOGPROB_KIND_UNSPECIFIED, pb.LOGPROB_KIND_PROCESSED):
                return None
            value = value == pb.LOGPROB_KIND_PROCESSED
        elif field.is_repeated:
            value = dict(value) if field.message_type is not None else list(value)
        if not value and not field.has_presence:
            continue
        options[name] = value / 1000 if name in _SECONDS else value
    if prompt == [] and kind == "chat":
        return None  # an empty list is one of token ids
    return prompt, cast(GenerateOptions, options)


async def batch_refusals(served: Served, requests: list[pb.GenerateRequest], folder: Path) -> list[str | None]:
    """How ``baton generate --input`` refuses each request; None for those that it has no words for."""
    lines: list[str] = []
    numbers: list[int | None] = []
    for request in requests:
        said = as_options(request)
        numbers.append(None if said is None else len(lines))
        if said is not None:
            prompt, options = said
            name = {"text": "prompt", "token_ids": "token_ids", "chat": "messages"}[request.WhichOneof("prompt") or ""]
            lines.append(json.dumps({name: prompt, **options}))
    source, results = folder / "requests.jsonl", folder / "results.jsonl"
    source.write_text("\n".join(lines))
    baton = Path(sys.executable).with_name("baton")
    arguments = ("generate", "--input", source, "--output", results, "--server", f"127.0.0.1:{served.server.port}")
    process = await asyncio.create_subprocess_exec(baton, *arguments, stderr=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 1
    answers = [json.loads(line) for line in results.read_text().splitlines()]
    return [None if number is None else answers[number].get("error", "OK") for number in numbers]
