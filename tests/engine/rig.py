"""An engine loop on a thread, and somebody who plays its api process."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from baton_protos import engine_pb2 as pb
from baton_protos.columns import INT64, pack, unpack
from baton_protos.execution_pb2 import RowSampling
from scheduler_service.config import ProcessSpec, SchedulerSettings
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.engine.loop import EngineLoop
from scheduler_service.engine.sockets import bind_router, bound_endpoint

VOCAB = 500
CAPACITY = ExecutorCapacity(
    block_size=4, num_blocks=96, max_rows=16, max_batched_tokens=64, max_model_len=128, vocab_size=VOCAB
)


class Engine:
    """An engine loop on a thread of this process."""

    def __init__(self, directory: Path) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.api_endpoint = f"ipc://{directory / 'engine'}"
        api = bind_router(context, self.api_endpoint, 100_000)
        executors = bind_router(context, "tcp://127.0.0.1:0", 1000)
        self.executor_endpoint = bound_endpoint(executors)
        settings = SchedulerSettings(model=directory, check_integrity=True, lease=1.0)
        spec = ProcessSpec(settings=settings, scheduler_id="s", engine_endpoint=self.api_endpoint)
        self.loop = EngineLoop(spec, api, executors)
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self._context = context

    def _run(self) -> None:
        try:
            self.loop.run()
        except Exception as error:
            self.error = error

    def close(self) -> None:
        self.loop.stop()
        self.thread.join()
        self._context.destroy(linger=0)
        assert self.error is None


class Api:
    """What an api process says and hears."""

    def __init__(self, endpoint: str, name: bytes = b"api-0") -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, name)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.limits = pb.Limits()
        self.status: pb.Status | None = None
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, int] = {}
        self.finished: dict[int, pb.FinishedRequest] = {}
        self.batches: list[pb.OutputBatch] = []
        self.send(attach=pb.Attach())

    def send(self, **body: object) -> None:
        self.socket.send(pb.ToEngine(**body).SerializeToString())

    def submit(
        self, handle: int, prompt: list[int], max_tokens: int, seed: int, stops: list[int], **more: object
    ) -> None:
        sampling = RowSampling(temperature=1.0, top_p=1.0, seed=seed, stop_token_ids=pack(stops))
        self.submit_row(handle, prompt, max_tokens, sampling, **more)

    def submit_row(
        self, handle: int, prompt: list[int], max_tokens: int, sampling: RowSampling, **more: object
    ) -> None:
        self.outputs[handle] = []
        submit = pb.Submit(
            handle=handle, prompt_token_ids=pack(prompt), max_tokens=max_tokens, sampling=sampling, **more
        )
        self.send(submit=submit)

    def wait(self, condition: Callable[[], object], timeout: float = 60.0) -> None:
        """Take in frames until the condition holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            if self.socket.poll(50):
                self._receive(pb.FromEngine.FromString(self.socket.recv()))

    def _receive(self, message: pb.FromEngine) -> None:
        match message.WhichOneof("body"):
            case "limits":
                self.limits = message.limits
            case "status":
                self.status = message.status
            case "outputs":
                handles = unpack(message.outputs.handles, INT64).tolist()
                for handle, token in zip(handles, unpack(message.outputs.token_ids).tolist(), strict=True):
                    assert handle not in self.ends
                    self.outputs[handle].append(token)
                for end in message.outputs.finished:
                    assert end.handle not in self.ends
                    self.ends[end.handle] = end.outcome
                    self.finished[end.handle] = end
                self.batches.append(message.outputs)

    def idle_status(self) -> pb.Status:
        self.status = None
        self.send(status=pb.StatusQuery(query_id=1))
        self.wait(lambda: self.status)
        assert self.status is not None
        return self.status

    def close(self) -> None:
        self.context.destroy(linger=0)
