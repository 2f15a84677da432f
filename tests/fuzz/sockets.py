"""Strangers before both ports of a real cluster, while neighbours' streams go on as if nobody were there."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import zmq
from google.protobuf.message_factory import GetMessageClass
from zmq.auth import load_certificate

from baton import AsyncClient, Client, ClusterOptions, Completion, Credentials, LocalCluster
from baton.channel import open_aio_channel
from baton.checkpoints import TINY_PYTHON
from baton.keys import KeyDirectory
from baton_protos import admin_pb2, execution_pb2
from baton_protos import generation_pb2 as pb
from tests.fuzz.mutation import Mutator, golden

_BAD_WORDS = ("Traceback", "died", "unexpected")
_NEIGHBOURS = 3
_MAX_TOKENS = 60
_BATCH = 200
_CALL_SECONDS = 0.2  # what is served by accident ends then
_GREETINGS = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"),
    bytes.fromhex("ff00000000000000017f03004e554c4c") + bytes(48),
    bytes.fromhex("ff00000000000000017f03004355525645") + bytes(47),
    bytes.fromhex("16030100f1010000ed0303") + bytes(200),
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
)


class Log:
    """Remembers what the cluster's processes write."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def progress(self, text: str) -> None:
        """See Reporter."""

    def event(self, line: str) -> None:
        """See Reporter."""
        self.lines.append(line)

    def log(self, process: str, line: str) -> None:
        """See Reporter."""
        self.lines.append(f"{process}: {line}")


class SocketTarget:
    """A cluster with one executor; ``protected``: with TLS, tokens and keys, of which some strangers have some."""

    def __init__(self, seed: int, *, protected: bool) -> None:
        self.served = 0
        self.log = Log()
        self._stack = ExitStack()
        self._mutator = Mutator(seed)
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-fuzz-"))) / "keys"
        options = ClusterOptions(model=TINY_PYTHON, port=0, threads=1, num_blocks=1000)
        self._stranger = Credentials()
        if protected:
            options = _protected(options, directory)
            self._stranger = replace(options.credentials, token="")
        self._credentials = options.credentials
        self._cluster = self._stack.enter_context(LocalCluster(options, self.log))
        self._pids = self._cluster.executor_pids()
        assert self._cluster._endpoints is not None
        self._executor_endpoint = self._cluster._endpoints.executors
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stack.callback(self._context.destroy, linger=0)
        self._dealers = [self._dealer(None)]
        if protected:  # one that is let in, and sends nonsense
            self._dealers.append(self._dealer(directory))
        self._envelopes = self._mutator.frames(execution_pb2.Envelope, golden(execution_pb2.Envelope))
        self._requests = _requests(self._mutator)
        with Client(self._cluster.address, credentials=self._credentials) as client:
            self._expected = [self._ask(client, index) for index in range(_NEIGHBOURS)]

    def run(self, messages: int, progress: Callable[[int], None]) -> None:
        """Send so many hostile messages; ``progress`` is told how many have been sent."""
        asyncio.run(self._run(messages, progress))
        assert self._cluster.failure is None
        assert self._cluster.executor_pids() == self._pids, "the executor was started again"
        lines = self.log.lines
        errors = [at for at, line in enumerate(lines) if any(word in line for word in _BAD_WORDS)]
        assert not errors, "\n".join(lines[max(0, errors[0] - 2) : errors[0] + 30])

    def close(self) -> None:
        """Stop the cluster."""
        self._stack.close()

    async def _run(self, messages: int, progress: Callable[[int], None]) -> None:
        done = asyncio.Event()
        async with (
            AsyncClient(self._cluster.address, credentials=self._credentials) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for index in range(_NEIGHBOURS):
                tasks.create_task(self._neighbour(client, index, done))
            try:
                await self._attack(messages, progress)
            finally:
                done.set()

    async def _neighbour(self, client: AsyncClient, index: int, done: asyncio.Event) -> None:
        while not done.is_set():
            completion = await client.stream(**_question(index)).result()
            assert _same(completion, self._expected[index])
            self.served += 1

    async def _attack(self, messages: int, progress: Callable[[int], None]) -> None:
        channels = [open_aio_channel(self._cluster.address, one) for one in {self._credentials, self._stranger}]
        sent = 0
        while sent < messages:
            calls = []
            for _ in range(min(_BATCH, messages - sent)):
                kind = self._mutator.rng.random()
                if kind < 0.6:
                    calls.append(self._call(self._mutator.rng.choice(channels)))
                elif kind < 0.95:
                    self._send_frame()
                else:
                    self._send_noise()
                sent += 1
            await asyncio.gather(*calls)
            progress(sent)
        for channel in channels:
            await channel.close()

    async def _call(self, channel: Any) -> None:
        method, streams, message = next(self._requests)
        metadata = self._credentials.metadata("127.0.0.1:1") if self._mutator.rng.random() < 0.5 else ()
        make = channel.unary_stream if streams else channel.unary_unary
        call = make(method)(message, metadata=metadata, timeout=_CALL_SECONDS)
        with contextlib.suppress(grpc.RpcError):
            if streams:
                async for _ in call:
                    pass
            else:
                await call

    def _send_frame(self) -> None:
        with contextlib.suppress(zmq.Again):  # it has no connection, and its queue is full: as it should be
            self._mutator.rng.choice(self._dealers).send(next(self._envelopes), zmq.NOBLOCK)

    def _send_noise(self) -> None:
        rng = self._mutator.rng
        target = rng.choice((self._cluster.address, self._executor_endpoint.removeprefix("tcp://")))
        host, _, port = target.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2) as connection:
            connection.sendall(self._mutator.changed_bytes(rng.choice(_GREETINGS), rng.choice(_GREETINGS)))

    def _dealer(self, keys: Path | None) -> "zmq.Socket[bytes]":
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.SNDHWM, 100)
        if keys is not None:
            dealer.curve_publickey, dealer.curve_secretkey = load_certificate(keys / "executor-b.key")
            dealer.curve_serverkey, _ = load_certificate(keys / "scheduler.pub")
        dealer.connect(self._executor_endpoint)
        return dealer

    def _ask(self, client: Client, index: int) -> Completion:
        return client.stream(**_question(index)).result()


def _question(index: int) -> Any:
    return {"prompt": f"def f{index}(", "max_tokens": _MAX_TOKENS, "ignore_eos": True, "seed": index}


def _same(one: Completion, other: Completion) -> bool:
    return (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


def _protected(options: ClusterOptions, directory: Path) -> ClusterOptions:
    made = KeyDirectory(directory)
    for name in ("a", "b"):
        made.executor(name)
    made.server(["127.0.0.1"], days=1)
    made.tenant("acme")
    scheduler = {
        "tls-cert": "server.crt",
        "tls-key": "server.key",
        "tokens": "tokens",
        "curve-key": "scheduler.key",
        "executor-keys": "executors",
    }
    executor = {"curve-key": "executor-a.key", "scheduler-key": "scheduler.pub"}
    return replace(
        options,
        scheduler_arguments=[f"--{flag}={directory / file}" for flag, file in scheduler.items()],
        executor_arguments=[f"--{flag}={directory / file}" for flag, file in executor.items()],
        credentials=Credentials(ca=directory / "ca.crt", token=(directory / "token-acme").read_text().strip()),
    )


def _requests(mutator: Mutator) -> Iterator[tuple[str, bool, bytes]]:
    """Method, whether it streams, and a message that is hardly what it takes."""
    made = []
    for service in (pb.DESCRIPTOR.services_by_name["Generation"], admin_pb2.DESCRIPTOR.services_by_name["Admin"]):
        for method in service.methods:
            kind = GetMessageClass(method.input_type)
            frames = mutator.frames(kind, golden(kind))
            made.append((f"/{service.full_name}/{method.name}", method.server_streaming, frames))
    while True:
        name, streams, frames = mutator.rng.choice(made)
        yield name, streams, next(frames)
