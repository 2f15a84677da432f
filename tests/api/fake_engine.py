"""An engine without a core: speaks engine.proto over real ZeroMQ and answers a function of each request."""

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio

from baton_protos import engine_pb2 as pb
from baton_protos import generation_pb2
from baton_protos.columns import INT64, pack, unpack

VOCAB_SIZE = 512


def token_of(submit: pb.Submit, index: int) -> int:
    """The request's token at ``index``: a hash of its prompt, seed and the index."""
    key = submit.prompt_token_ids + submit.sampling.seed.to_bytes(8, "little") + index.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") % VOCAB_SIZE


@dataclass
class Running:
    peer: bytes
    submit: pb.Submit
    stop: frozenset[int]
    done: int = 0


def default_limits() -> pb.Limits:
    return pb.Limits(
        ready_executors=1,
        max_total_tokens=1000,
        vocab_size=VOCAB_SIZE,
        model_fingerprint="f00d",
        dtype="float32",
        scheduler_id="test-scheduler",
    )


@dataclass
class FakeEngine:
    """Runs on the test's event loop. ``peers`` are the api processes in the order in which they attached."""

    step_seconds: float = 0.002
    frames_per_step: int = 1
    paused: bool = False
    silent: bool = False
    limits: pb.Limits = field(default_factory=default_limits)
    token: Callable[[pb.Submit, int], int] = token_of
    verdict: pb.FinishedRequest | None = None  # answer every request with this instead of tokens
    tokens_before_verdict: int = 0
    submits: list[pb.Submit] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    peers: list[bytes] = field(default_factory=list)
    running: dict[tuple[bytes, int], Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="baton-api-"))
        self.endpoint = f"ipc://{self._folder}/engine"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._socket.bind(self.endpoint)
        self._tasks = [asyncio.create_task(work()) for work in (self._receive, self._heartbeat, self._steps)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def set_limits(self, **changes: int | str) -> None:
        for name, value in changes.items():
            setattr(self.limits, name, value)
        for peer in self.peers:
            await self.send(peer, pb.FromEngine(limits=self.limits))

    async def send(self, peer: bytes, message: pb.FromEngine) -> None:
        if not self.silent:
            await self._socket.send_multipart([peer, message.SerializeToString()])

    async def send_raw(self, frame: bytes) -> None:
        for peer in self.peers:
            await self._socket.send_multipart([peer, frame])

    async def _receive(self) -> None:
        while True:
            peer, frame = await self._socket.recv_multipart()
            message = pb.ToEngine.FromString(frame)
            match message.WhichOneof("body"):
                case "attach":
                    if peer not in self.peers:
                        self.peers.append(peer)
                    await self.send(peer, pb.FromEngine(limits=self.limits))
                case "submit":
                    await self._submit(peer, message.submit)
                case "abort":
                    await self._abort(peer, unpack(message.abort.handles, INT64).tolist())
                case "status":
                    executor = generation_pb2.ExecutorStatus(executor_id="fake", total_blocks=7)
                    status = pb.Status(query_id=message.status.query_id, queued_requests=3, executors=[executor])
                    await self.send(peer, pb.FromEngine(status=status))
                case "forward_abort":
                    for other in self.peers:
                        if other != peer:
                            await self.send(other, pb.FromEngine(forward_abort=message.forward_abort))
                case body:
                    raise AssertionError(body)

    async def _submit(self, peer: bytes, submit: pb.Submit) -> None:
        assert peer in self.peers
        self.submits.append(submit)
        request = Running(peer, submit, frozenset(unpack(submit.sampling.stop_token_ids).tolist()))
        if self.verdict is None:
            self.running[peer, submit.handle] = request
            return
        for _ in range(self.tokens_before_verdict):
            await self._outputs(peer, [request])
        finished = pb.FinishedRequest()
        finished.CopyFrom(self.verdict)
        finished.handle = submit.handle
        await self.send(peer, pb.FromEngine(outputs=pb.OutputBatch(finished=[finished])))

    async def _abort(self, peer: bytes, handles: list[int]) -> None:
        self.aborted += handles
        ended = [
            pb.FinishedRequest(handle=handle, outcome=pb.OUTCOME_ABORT)
            for handle in handles
            if self.running.pop((peer, handle), None)
        ]
        await self.send(peer, pb.FromEngine(outputs=pb.OutputBatch(finished=ended)))

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            await self.set_limits()

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_seconds)
            for _ in range(0 if self.paused else self.frames_per_step):
                for peer in self.peers:
                    requests = [request for request in self.running.values() if request.peer == peer]
                    if requests:
                        await self._outputs(peer, requests)

    async def _outputs(self, peer: bytes, requests: list[Running]) -> None:
        tokens = [self.token(request.submit, request.done) for request in requests]
        finished = []
        for request, token in zip(requests, tokens, strict=True):
            request.done += 1
            stopped = token in request.stop
            if stopped or request.done == request.submit.max_tokens:
                outcome = pb.OUTCOME_STOP if stopped else pb.OUTCOME_LENGTH
                handle = request.submit.handle
                finished.append(pb.FinishedRequest(handle=handle, outcome=outcome, cached_tokens=2))
                self.running.pop((peer, handle), None)
        batch = pb.OutputBatch(
            handles=pack([request.submit.handle for request in requests], INT64),
            token_ids=pack(tokens),
            finished=finished,
        )
        await self.send(peer, pb.FromEngine(outputs=batch))
