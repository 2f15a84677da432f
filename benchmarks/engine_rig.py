"""A real engine process, and somebody who plays its api process: requests in, tokens out, no gRPC."""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zmq

from baton_protos import engine_pb2 as pb
from baton_protos import execution_pb2, generation_pb2
from baton_protos.columns import INT64, pack, unpack
from benchmarks.processes import Child, python_module
from benchmarks.workloads import Request
from scheduler_service.config import ProcessSpec, SchedulerSettings

_START_SECONDS = 60.0
_LEASE_SECONDS = 10.0  # a busy machine shall not cost a benchmark its executor


class RequestFailedError(Exception):
    """A request ended otherwise than at its length."""


class EngineProcess:
    """The engine behind its real sockets: executors dial ``endpoint``, api processes ``api_endpoint``."""

    def __init__(self, max_queued_requests: int = 100_000) -> None:
        self._stack = ExitStack()
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-"))
        settings = SchedulerSettings(
            model=Path(directory),
            executor_endpoint="tcp://127.0.0.1:0",
            max_queued_requests=max_queued_requests,
            log_level="error",
            lease=_LEASE_SECONDS,
        )
        self.api_endpoint = f"ipc://{directory}/engine"
        spec = ProcessSpec(settings=settings, scheduler_id="bench", engine_endpoint=self.api_endpoint)
        command = python_module("scheduler_service.engine", spec.model_dump_json())
        self._child = self._stack.enter_context(Child("engine", command))
        self.endpoint = self._child.line(_START_SECONDS)

    @property
    def pid(self) -> int:
        return self._child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class EngineCaller:
    """Runs requests on an engine as its only api process."""

    def __init__(self, endpoint: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, b"api-0")
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)
        self._next_handle = 0
        self._send(attach=pb.Attach())

    def close(self) -> None:
        """Leave the engine."""
        self._socket.close()

    def wait_ready(self, timeout: float) -> None:
        """Return once an executor takes plans.

        Raises:
            TimeoutError: none does in time.
        """
        deadline = time.monotonic() + timeout
        while not self._receive(deadline - time.monotonic()).limits.ready_executors:
            pass

    def run(self, requests: Sequence[Request], timeout: float) -> None:
        """Run requests together, to their lengths.

        Raises:
            RequestFailedError: one of them failed.
            TimeoutError: they did not end in time.
        """
        deadline = time.monotonic() + timeout
        first = self._next_handle
        for request in requests:
            self._submit(request)
        counts = np.zeros(len(requests), np.int64)
        running = len(requests)
        while running:
            outputs = self._receive(deadline - time.monotonic()).outputs
            counts += np.bincount(unpack(outputs.handles, INT64) - first, minlength=len(requests))
            for end in outputs.finished:
                if end.outcome != pb.OUTCOME_LENGTH:
                    raise RequestFailedError(f"{pb.Outcome.Name(end.outcome)}: {end.message}")
            running -= len(outputs.finished)
        if counts.tolist() != [request.max_tokens for request in requests]:
            raise RequestFailedError("some outputs have other lengths than asked for")

    def executor(self, timeout: float) -> generation_pb2.ExecutorStatus:
        """The engine's view of its only executor.

        Raises:
            TimeoutError: the engine does not answer in time.
        """
        self._send(status=pb.StatusQuery(query_id=1))
        deadline = time.monotonic() + timeout
        while not (message := self._receive(deadline - time.monotonic())).HasField("status"):
            pass
        (executor,) = message.status.executors
        return executor

    def _submit(self, request: Request) -> None:
        prompt = pack(request.prompt)
        submit = pb.Submit(
            handle=self._next_handle,
            prompt_token_ids=prompt,
            max_tokens=request.max_tokens,
            sampling=execution_pb2.RowSampling(top_p=1.0),
        )
        self._next_handle += 1
        self._send(submit=submit)

    def _send(self, **body: Any) -> None:
        self._socket.send(pb.ToEngine(**body).SerializeToString())

    def _receive(self, timeout: float) -> pb.FromEngine:
        if timeout <= 0 or not self._socket.poll(int(timeout * 1e3) + 1):
            raise TimeoutError("the engine has not answered in time")
        return pb.FromEngine.FromString(self._socket.recv())
