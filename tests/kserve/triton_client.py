"""Calls with the `tritonclient` package, for ForeignScript: its argument is the server's address."""

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc as blocking
from tritonclient.grpc import aio, model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

ADDRESS = sys.argv[1]
FLAGS = ("stream", "exclude_input_in_output", "return_finish_reason", "return_num_output_tokens")
client = blocking.InferenceServerClient(ADDRESS)


def tensors(library: Any, text: str, options: dict[str, Any]) -> list[Any]:
    """Flags are tensors, max_tokens is one as TensorRT-LLM has it, the rest is JSON."""
    options = dict(options)
    flags = {name: np.array([options.pop(name)], bool) for name in FLAGS if name in options}
    arrays = {"text_input": np.array([text.encode()], np.object_), **flags}
    if "max_tokens" in options:
        arrays["max_tokens"] = np.array([options.pop("max_tokens")], np.int32)
    if options:
        arrays["sampling_parameters"] = np.array([json.dumps(options).encode()], np.object_)
    kinds = {np.dtype(bool): "BOOL", np.dtype(np.int32): "INT32", np.dtype(np.object_): "BYTES"}
    inputs = []
    for name, array in arrays.items():
        tensor = library.InferInput(name, list(array.shape), kinds[array.dtype])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def read(result: Any) -> dict[str, Any]:
    """Outputs, id and whether it is the last answer."""
    response = result.get_response()
    values: dict[str, Any] = {"id": response.id, "final": response.parameters["triton_final_response"].bool_param}
    for output in response.outputs:
        array = result.as_numpy(output.name).tolist()
        values[output.name] = [one.decode() if isinstance(one, bytes) else one for one in array]
    return values


def health(model: str) -> Any:
    return [client.is_server_live(), client.is_server_ready(), client.is_model_ready(model), client.is_model_ready("x")]


def about(model: str) -> Any:
    server, metadata = client.get_server_metadata(as_json=True), client.get_model_metadata(model, as_json=True)
    return server, metadata, client.get_model_config(model, as_json=True)


def statistics(model: str) -> Any:
    return client.get_inference_statistics(model, as_json=True)


def infer(model: str, text: str, call_id: str = "", **options: Any) -> Any:
    inputs = tensors(blocking, text, options)
    return read(client.infer(model, inputs, request_id=call_id, client_timeout=60))


def infer_by_parameters(model: str, text: str, priority: int, **options: Any) -> Any:
    """Options in the request's own parameters, and its priority."""
    return read(client.infer(model, tensors(blocking, text, {}), parameters=options, priority=priority))


def outputs(model: str, text: str, names: list[str], **options: Any) -> Any:
    wanted = [blocking.InferRequestedOutput(name) for name in names]
    return read(client.infer(model, tensors(blocking, text, options), outputs=wanted))


def infer_error(model: str, text: str, **options: Any) -> Any:
    try:
        client.infer(model, tensors(blocking, text, options))
    except InferenceServerException as error:
        return error.status(), error.message()
    return None


def stream(model: str, requests: list[dict[str, Any]], enable_empty_final_response: bool = False) -> Any:
    """Answers and errors of requests on one stream, until each has had its last."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for request in requests:
        options = {name: value for name, value in request.items() if name not in ("text", "id")}
        client.async_stream_infer(
            model,
            tensors(blocking, request["text"], options),
            request_id=request["id"],
            enable_empty_final_response=enable_empty_final_response,
        )
    got, open_requests = [], len(requests)
    while open_requests:
        result, error = answers.get(timeout=60)
        got.append({"error": error.message()} if error is not None else read(result))
        open_requests -= error is not None or got[-1]["final"]
    client.stop_stream()
    return got


def leave_stream(model: str, text: str, count: int, **options: Any) -> Any:
    """Cancel a stream with so many requests under way; what the callback hears."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for index in range(count):
        client.async_stream_infer(model, tensors(blocking, text, options), request_id=str(index))
    seen = set()
    while len(seen) < count:
        seen.add(read(answers.get(timeout=60)[0])["id"])
    client.stop_stream(cancel_requests=True)
    last = None
    while not answers.empty():
        last = answers.get()
    assert last is not None
    return last[1].status() if last[1] is not None else None


def aio_calls(model: str, text: str, **options: Any) -> Any:
    """Health, an inference and a stream of two, with the asyncio client."""

    async def run() -> Any:
        async with aio.InferenceServerClient(ADDRESS) as asynchronous:
            assert await asynchronous.is_model_ready(model)
            whole = read(await asynchronous.infer(model, tensors(aio, text, options)))

            async def requests() -> AsyncIterator[dict[str, Any]]:
                for index in range(2):
                    inputs = tensors(aio, text, {**options, "stream": True})
                    yield {"model_name": model, "inputs": inputs, "request_id": str(index)}

            pieces = []
            async for result, error in asynchronous.stream_infer(requests()):
                assert error is None, error
                pieces.append(read(result))
            return whole, pieces

    return asyncio.run(run())


def aio_leave(model: str, text: str, **options: Any) -> Any:
    """Cancel the asyncio client's stream after its first answer."""

    async def run() -> None:
        async with aio.InferenceServerClient(ADDRESS) as asynchronous:

            async def requests() -> AsyncIterator[dict[str, Any]]:
                yield {"model_name": model, "inputs": tensors(aio, text, {**options, "stream": True})}
                await asyncio.Event().wait()

            iterator = asynchronous.stream_infer(requests())
            await anext(iterator)
            iterator.cancel()

    asyncio.run(run())


def field_numbers() -> Any:
    """The protocol as tritonclient was built with it: (name, number, type, repeated) of each message's fields."""
    found = {}

    def walk(descriptor: Any) -> None:
        found[descriptor.full_name] = sorted(
            [field.name, field.number, field.type, field.is_repeated] for field in descriptor.fields
        )
        for nested in descriptor.nested_types:
            walk(nested)

    for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR):
        for descriptor in file.message_types_by_name.values():
            walk(descriptor)
    return found


def protected(address: str, authority: str, headers: dict[str, str], model: str, text: str) -> Any:
    """An inference through TLS, with headers; the status if it is refused."""
    with blocking.InferenceServerClient(address, ssl=True, root_certificates=authority) as secure:
        try:
            result = secure.infer(model, tensors(blocking, text, {"max_tokens": 5}), headers=headers)
        except InferenceServerException as error:
            return error.status()
        return read(result)["text_output"]
