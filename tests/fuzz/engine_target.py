"""The real engine loop, with honest neighbours and attackers on its sockets, in one thread under a clock of its own."""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from google.protobuf.message import DecodeError

from baton_protos import engine_pb2, execution_pb2
from baton_protos.columns import INT64, pack, unpack
from scheduler_service.config import ProcessSpec, SchedulerSettings
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.engine.loop import EngineLoop
from scheduler_service.engine.sockets import bind_router
from tests.fakes.shadow_executor import ShadowExecutor, oracle
from tests.fakes.shadow_link import decode_plan, encode_result
from tests.fuzz.mutation import Mutator, golden

VOCAB = 500
CAPACITY = ExecutorCapacity(
    block_size=4, num_blocks=96, max_rows=16, max_batched_tokens=64, max_model_len=128, vocab_size=VOCAB
)
_SCHEDULER_ID = "s"
_FINGERPRINT = "shadow"
_TURN_SECONDS = 0.002
_FRAMES_PER_TURN = 8
_BEAT_TURNS = 20
_LIVE_REQUESTS = 4
_STORM_FRAMES = 400  # then the attacking api process attaches anew, and what it has submitted ends
_SETTLE_TURNS = 20_000
_MOST_LOGPROBS = 20


class Neighbour:
    """An honest executor without a model."""

    def __init__(self, socket: "zmq.Socket[bytes]", name: str, boot_id: int) -> None:
        self.socket = socket
        self.name = name
        self.frames: list[bytes] = []  # what it has sent lately: what attackers would love to have seen
        self._boot_id = boot_id
        self._nonce = 1
        self._epoch = self._received = 0
        self._shadow = ShadowExecutor(CAPACITY)
        self._results: dict[int, execution_pb2.StepResult] = {}

    def start_anew(self) -> None:
        """Ask for a new session."""
        self._nonce += 1
        self._epoch = 0

    def beat(self) -> None:
        """Say hello until welcomed, then that it is alive; send again what was not acknowledged."""
        if not self._epoch:
            self._send(hello=self.hello())
            return
        self._send(heartbeat=execution_pb2.Heartbeat(last_step=self._received))
        for result in self._results.values():
            self._send(result=result)

    def hello(self) -> execution_pb2.Hello:
        """Its capacity."""
        c = CAPACITY
        return execution_pb2.Hello(
            nonce=self._nonce,
            executor_id=self.name,
            model_fingerprint=_FINGERPRINT,
            device="shadow",
            vocab_size=c.vocab_size,
            max_model_len=c.max_model_len,
            block_size=c.block_size,
            num_blocks=c.num_blocks,
            max_rows=c.max_rows,
            max_batched_tokens=c.max_batched_tokens,
        )

    def receive(self) -> None:
        """Do what the scheduler says."""
        while self.socket.poll(0):
            self._obey(execution_pb2.Envelope.FromString(self.socket.recv()))

    def _obey(self, envelope: execution_pb2.Envelope) -> None:
        for step_id in [step for step in self._results if step <= envelope.acked]:
            del self._results[step_id]
        match envelope.WhichOneof("body"):
            case "welcome":
                assert envelope.welcome.accepted, envelope.welcome.reject_reason
                if envelope.epoch != self._epoch:
                    self._epoch, self._received = envelope.epoch, 0
                    self._shadow = ShadowExecutor(CAPACITY)
                    self._results.clear()
                self._send(ready=execution_pb2.Ready())
            case "plan" if envelope.epoch == self._epoch and envelope.plan.step_id == self._received + 1:
                self._received += 1
                result = self._shadow.execute(decode_plan(envelope.plan))
                answer = encode_result(result)
                self._results[result.step_id] = answer
                self._send(result=answer)

    def _send(self, **body: object) -> None:
        scheduler_id = _SCHEDULER_ID if self._epoch else ""
        frame = execution_pb2.Envelope(
            version=1,
            scheduler_id=scheduler_id,
            boot_id=self._boot_id,
            epoch=self._epoch,
            acked=self._received,
            **body,  # type: ignore[arg-type]
        ).SerializeToString()
        self.frames = [*self.frames[-20:], frame]
        self.send(frame)

    def send(self, frame: bytes) -> None:
        """Hand a frame to the scheduler."""
        self.socket.send(frame)


class Traitor:
    """An executor that was let in, and of whose frames about every second one is not what it should be."""

    def __init__(self, socket: "zmq.Socket[bytes]", mutator: Mutator) -> None:
        self._mutator = mutator
        self._socket = socket
        self._valid = golden(execution_pb2.Envelope)
        self.inside = Neighbour(socket, "traitor", boot_id=9)
        self.inside.send = self._send  # type: ignore[method-assign]

    def beat(self) -> None:
        """Now and then it wants a new session: the scheduler may have ended the one it has."""
        if self._mutator.rng.random() < 0.3:
            self.inside.start_anew()
        self.inside.beat()

    def receive(self) -> None:
        """Do what the scheduler says, as far as that makes sense after what it was told."""
        try:
            self.inside.receive()
        except AssertionError:
            self.inside.start_anew()

    def _send(self, frame: bytes) -> None:
        if self._mutator.rng.random() < 0.5:
            self._socket.send(frame)
        elif self._mutator.rng.random() < 0.7:
            self._socket.send(self._mutator.changed_message(execution_pb2.Envelope, frame))
        else:
            self._socket.send(self._mutator.changed_bytes(frame, self._mutator.rng.choice(self._valid)))


@dataclass
class Asked:
    """A request of the honest api process, and what has come of it."""

    prompt: list[int]
    max_tokens: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    outcome: int | None = None

    @property
    def expected(self) -> list[int]:
        """What must come of it."""
        return oracle(self.prompt, self.max_tokens, self.seed, (), VOCAB)


class Api:
    """An honest api process that always has a few requests under way.

    Where a traitor may answer them, tokens need only be tokens, and every request must end once.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", mutator: Mutator, *, betrayed: bool) -> None:
        self._betrayed = betrayed
        self.socket = socket
        self.served = 0
        self.frames: list[bytes] = []
        self.live: dict[int, Asked] = {}
        self._rng = mutator.rng
        self._handles = itertools.count(1)
        self._send(attach=engine_pb2.Attach())

    def submit(self) -> None:
        """Ask for something more."""
        handle = next(self._handles)
        prompt = [self._rng.randrange(VOCAB) for _ in range(self._rng.randint(1, 20))]
        asked = Asked(prompt, self._rng.randint(1, 30), self._rng.getrandbits(64))
        self.live[handle] = asked
        sampling = execution_pb2.RowSampling(temperature=1.0, top_p=1.0, seed=asked.seed)
        self._send(
            submit=engine_pb2.Submit(
                handle=handle, prompt_token_ids=pack(asked.prompt), max_tokens=asked.max_tokens, sampling=sampling
            )
        )

    def receive(self) -> None:
        """Take tokens in; check those of requests that have ended."""
        while self.socket.poll(0):
            outputs = engine_pb2.FromEngine.FromString(self.socket.recv()).outputs
            for handle, token in zip(unpack(outputs.handles, INT64), unpack(outputs.token_ids), strict=True):
                self.live[int(handle)].tokens.append(int(token))
            for end in outputs.finished:
                asked = self.live.pop(end.handle)
                self.served += 1
                if self._betrayed:
                    assert len(asked.tokens) <= asked.max_tokens
                    assert all(0 <= token < VOCAB for token in asked.tokens), asked
                else:
                    assert end.outcome == engine_pb2.OUTCOME_LENGTH, (end, asked)
                    assert asked.tokens == asked.expected

    def _send(self, **body: object) -> None:
        frame = engine_pb2.ToEngine(**body).SerializeToString()  # type: ignore[arg-type]
        self.frames = [*self.frames[-20:], frame]
        self.socket.send(frame)


class EngineTarget:
    """Frames go in by ``throw``; whatever they do to the engine, or to a neighbour, comes out as an exception."""

    def __init__(self, seed: int, *, betrayed: bool = False) -> None:
        """Start an engine; ``betrayed``: one of the executors that were let in is a traitor."""
        self._stack = ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-fuzz-")))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stack.callback(context.destroy, linger=0)
        executors = bind_router(context, "inproc://executors", 10_000)
        api = bind_router(context, "inproc://api", 10_000)
        settings = SchedulerSettings(model=directory, check_integrity=True)
        spec = ProcessSpec(settings=settings, scheduler_id=_SCHEDULER_ID, engine_endpoint="inproc://api")
        self._now = 0.0
        self._loop = EngineLoop(spec, api, executors, clock=lambda: self._now)
        self._mutator = Mutator(seed)
        self._neighbour = Neighbour(_dealer(context, "inproc://executors", b"neighbour"), "neighbour", boot_id=7)
        self._api = Api(_dealer(context, "inproc://api", b"api-0"), self._mutator, betrayed=betrayed)
        self._traitor: Traitor | None = None
        if betrayed:
            self._traitor = Traitor(_dealer(context, "inproc://executors", b"traitor"), self._mutator)
        self._strangers = [_dealer(context, "inproc://executors", b"stranger%d" % i) for i in range(4)]
        self._api_stranger = _dealer(context, "inproc://api", b"api-1")
        self._envelopes = self._execution_frames()
        self._to_engine = self._engine_frames()
        self._turns = self._thrown = 0
        self._take_turns(_BEAT_TURNS)

    @property
    def served(self) -> int:
        """Neighbours' requests that ended as they must."""
        return self._api.served

    @property
    def frames_per_throw(self) -> int:
        """One at each port."""
        return 2

    def throw(self) -> None:
        """One hostile frame at each port."""
        self._mutator.rng.choice(self._strangers).send(next(self._envelopes))
        if self._thrown % _STORM_FRAMES == 0:
            self._api_stranger.send(engine_pb2.ToEngine(attach=engine_pb2.Attach()).SerializeToString())
        self._api_stranger.send(next(self._to_engine))
        self._thrown += 1
        if self._thrown % _FRAMES_PER_TURN == 0:
            while len(self._api.live) < _LIVE_REQUESTS:
                self._api.submit()
            self._take_turns(1)

    def finish(self) -> None:
        """Without attackers, what neighbours have asked for is served to its end."""
        self._api_stranger.send(engine_pb2.ToEngine(attach=engine_pb2.Attach()).SerializeToString())
        for _ in range(_SETTLE_TURNS):
            if not self._api.live:
                return
            self._take_turns(1)
        raise AssertionError(f"{len(self._api.live)} requests never ended")

    def close(self) -> None:
        """Free the sockets."""
        self._stack.close()

    def _take_turns(self, count: int) -> None:
        for _ in range(count):
            if self._turns % _BEAT_TURNS == 0:
                self._neighbour.beat()
                if self._traitor is not None:
                    self._traitor.beat()
            self._turns += 1
            self._now += _TURN_SECONDS
            self._loop.turn(0.0)
            self._neighbour.receive()
            if self._traitor is not None:
                self._traitor.receive()
            self._api.receive()
            for socket in (*self._strangers, self._api_stranger):
                while socket.poll(0):
                    socket.recv_multipart()

    def _execution_frames(self) -> Iterator[bytes]:
        """Also what a neighbour sends, changed; but nobody is let in with what only a true executor knows."""
        valid = golden(execution_pb2.Envelope)
        made = self._mutator.frames(execution_pb2.Envelope, valid)
        while True:
            if self._mutator.rng.random() < 0.3 and self._neighbour.frames:
                frame = self._mutator.changed_bytes(self._mutator.rng.choice(self._neighbour.frames), valid[0])
            else:
                frame = next(made)
            if _FINGERPRINT.encode() not in frame:
                yield frame

    def _engine_frames(self) -> Iterator[bytes]:
        valid = golden(engine_pb2.ToEngine)
        made = self._mutator.frames(engine_pb2.ToEngine, valid)
        while True:
            if self._mutator.rng.random() < 0.5:
                frame = self._mutator.changed_message(engine_pb2.ToEngine, self._mutator.rng.choice(self._api.frames))
            else:
                frame = next(made)
            yield _affordable(frame)


def _affordable(frame: bytes) -> bytes:
    """Without the billions of log probabilities that the neighbour, who sorts its vocabulary for each, would give."""
    try:
        message = engine_pb2.ToEngine.FromString(frame)
    except DecodeError:
        return frame
    sampling = message.submit.sampling
    if max(sampling.num_logprobs, sampling.num_prompt_logprobs) <= _MOST_LOGPROBS:
        return frame
    sampling.ClearField("num_logprobs")
    sampling.ClearField("num_prompt_logprobs")
    return message.SerializeToString()


def _dealer(context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, name: bytes) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, name)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    return socket
