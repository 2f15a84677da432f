"""An engine without a core: speaks engine.proto over real ZeroMQ and answers a function of each request."""

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zmq
import zmq.asyncio

from baton_protos import engine_pb2 as pb
from baton_protos import execution_pb2, generation_pb2
from baton_protos.columns import FLOAT32, INT64, pack, unpack

VOCAB_SIZE = 512
CACHED_TOKENS = 2  # of every prompt
QUEUE_US = 1500


def token_of(submit: pb.Submit, index: int) -> int:
    """The request's token at ``index``: a hash of its prompt, seed and the index."""
    key = submit.prompt_token_ids + submit.sampling.seed.to_bytes(8, "little") + index.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") % VOCAB_SIZE


def logprob_of(token_id: int) -> float:
    """What the log probability of a sampled token is; the top ones have half of it, a third, and so on."""
    return -1.0 - token_id / VOCAB_SIZE


def top_ids_of(token_id: int, count: int) -> list[int]:
    return [(token_id + offset) % VOCAB_SIZE for offset in range(count)]


def logprob_columns(token_ids: list[int], count: int) -> execution_pb2.LogprobColumns:
    tops = [top for token_id in token_ids for top in top_ids_of(token_id, count)]
    values = [logprob_of(token_id) / (rank + 2) for token_id in token_ids for rank in range(count)]
    return execution_pb2.LogprobColumns(
        logprobs=pack(np.array([logprob_of(token_id) for token_id in token_ids], FLOAT32), FLOAT32),
        ranks=pack([1 + token_id % 7 for token_id in token_ids]),
        top_counts=pack([count] * len(token_ids)),
        top_token_ids=pack(tops),
        top_logprobs=pack(np.array(values, FLOAT32), FLOAT32),
    )


@dataclass
class Running:
    peer: bytes
    submit: pb.Submit
    stop: frozenset[int]
    done: int = 0
    held: bool = False
    prompt_done: bool = False


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
    """Runs on the test's event loop. ``peers`` are the api processes in the order in which they attached.

    ``holds`` has a (handle, True) for every hold and a (handle, False) for every release.
    """

    step_seconds: float = 0.002
    frames_per_step: int = 1
    paused: bool = False
    silent: bool = False
    limits: pb.Limits = field(default_factory=default_limits)
    token: Callable[[pb.Submit, int], int] = token_of
    verdict: pb.FinishedRequest | None = None  # answer every request with this instead of tokens
    tokens_before_verdict: int = 0
    submits: list[pb.Submit] = field(default_factory=list)
    best_effort_at: int | None = None  # index of the token from which on another executor goes on, by other kernels
    aborted: list[int] = field(default_factory=list)
    holds: list[tuple[int, bool]] = field(default_factory=list)
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

    def handle_of(self, number: int) -> int | None:
        """Of a submit; None while it is on its way: a stream's first message may be there before."""
        return self.submits[number].handle if number < len(self.submits) else None

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
                case "hold":
                    self._hold(peer, message.hold)
                case "status":
                    executor = generation_pb2.ExecutorStatus(executor_id="fake", total_blocks=7)
                    status = pb.Status(
                        query_id=message.status.query_id, queued_requests=3, executors=[executor], oldest_queued_us=5
                    )
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
        resumed = len(unpack(submit.output_token_ids))
        request = Running(peer, submit, frozenset(unpack(submit.sampling.stop_token_ids).tolist()), resumed)
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
            pb.FinishedRequest(handle=handle, outcome=pb.OUTCOME_ABORT, cached_tokens=CACHED_TOKENS, queue_us=QUEUE_US)
            for handle in handles
            if self.running.pop((peer, handle), None)
        ]
        await self.send(peer, pb.FromEngine(outputs=pb.OutputBatch(finished=ended)))

    def _hold(self, peer: bytes, hold: pb.Hold) -> None:
        for column, held in ((hold.held, True), (hold.released, False)):
            for handle in unpack(column, INT64).tolist():
                self.holds.append((handle, held))
                if (peer, handle) in self.running:
                    self.running[peer, handle].held = held

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            await self.set_limits()

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_seconds)
            for _ in range(0 if self.paused else self.frames_per_step):
                for peer in self.peers:
                    mine = [request for request in self.running.values() if request.peer == peer]
                    requests = [request for request in mine if not request.held]
                    if requests:
                        await self._outputs(peer, requests)

    async def _outputs(self, peer: bytes, requests: list[Running]) -> None:
        moved = [request.submit.handle for request in requests if request.done == self.best_effort_at]
        tokens = [self.token(request.submit, request.done) for request in requests]
        finished = []
        for request, token in zip(requests, tokens, strict=True):
            sampling = request.submit.sampling
            stopped = token in request.stop and request.done >= sampling.min_tokens
            request.done += 1
            if stopped or request.done == request.submit.max_tokens:
                outcome = pb.OUTCOME_STOP if stopped else pb.OUTCOME_LENGTH
                handle = request.submit.handle
                finished.append(
                    pb.FinishedRequest(
                        handle=handle,
                        outcome=outcome,
                        cached_tokens=CACHED_TOKENS,
                        queue_us=QUEUE_US,
                        stop_token_id=token if stopped else 0,
                    )
                )
                self.running.pop((peer, handle), None)
        wanted = [i for i, request in enumerate(requests) if request.submit.sampling.HasField("num_logprobs")]
        batch = pb.OutputBatch(
            handles=pack([request.submit.handle for request in requests], INT64),
            token_ids=pack(tokens),
            finished=finished,
            best_effort_handles=pack(moved, INT64),
            prompt_logprobs=[part for request in requests for part in prompt_logprobs(request)],
        )
        if wanted:
            batch.logprob_indices = pack(wanted)
            counts = {requests[i].submit.sampling.num_logprobs for i in wanted}
            (count,) = counts  # requests of one test ask for the same
            batch.logprobs.CopyFrom(logprob_columns([tokens[i] for i in wanted], count))
        await self.send(peer, pb.FromEngine(outputs=batch))


def prompt_logprobs(request: Running) -> list[pb.PromptLogprobs]:
    """In two parts, as from a prefill in two chunks, and before the first token."""
    sampling = request.submit.sampling
    if request.prompt_done or not sampling.HasField("num_prompt_logprobs"):
        return []
    request.prompt_done = True
    ids = unpack(request.submit.prompt_token_ids).tolist()[1:]
    middle = len(ids) // 2
    handle = request.submit.handle
    return [
        pb.PromptLogprobs(
            handle=handle, start_position=1 + start, logprobs=logprob_columns(part, sampling.num_prompt_logprobs)
        )
        for start, part in ((0, ids[:middle]), (middle, ids[middle:]))
        if part
    ]
