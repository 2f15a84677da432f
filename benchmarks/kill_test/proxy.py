"""A TCP proxy whose way can be made longer, lossy, cut, or silent, on the event loop of the kill test."""

import asyncio
import contextlib
import itertools
import socket
from typing import Self

from benchmarks.kill_test.losses import LossyWay

_CHUNK = 1 << 18


class Proxy:
    """Passes connections on to one server."""

    def __init__(self, host: str, port: int, delay: float, loss: float) -> None:
        self._delay = delay
        self._loss = loss
        self._seeds = itertools.count(port)
        self._server_address = (host, port)
        self._listener: asyncio.Server | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self.endpoint = ""

    @classmethod
    async def open(cls, host: str, port: int, delay: float, loss: float) -> Self:
        """A proxy for the server at ``host:port``, which need not listen yet.

        Args:
            delay: seconds, each way.
            loss: share of ZeroMQ's messages that it loses.
        """
        proxy = cls(host, port, delay, loss)
        proxy._listener = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
        proxy.endpoint = f"tcp://127.0.0.1:{proxy._listener.sockets[0].getsockname()[1]}"
        return proxy

    def cut(self) -> None:
        """Break every connection; new ones are welcome."""
        for writer in list(self._writers):
            writer.transport.abort()

    def silence(self) -> None:
        """Let nothing through, and do not say so."""
        self._open.clear()

    def heal(self) -> None:
        """Let everything through again, what was held back first."""
        self._open.set()

    async def close(self) -> None:
        """Stop."""
        if self._listener is not None:
            self._listener.close()
        self.heal()
        self.cut()
        await asyncio.gather(*self._serving)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._server_address)
        except OSError:  # nobody listens: neither do we, then
            near_writer.transport.abort()
            return
        writers = (near_writer, far_writer)
        self._writers.update(writers)
        for writer in writers:
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(self._pass(near_reader, far_writer), self._pass(far_reader, near_writer))
        self._writers.difference_update(writers)
        for writer in writers:
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        way = LossyWay(self._loss, next(self._seeds)) if self._loss else None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while chunk := await reader.read(_CHUNK):
                await self._open.wait()
                passed = chunk if way is None else way.take(chunk)
                if self._delay:
                    loop.call_later(self._delay, _write, writer, passed)
                else:
                    writer.write(passed)
        with contextlib.suppress(OSError, RuntimeError):
            writer.transport.abort()


def _write(writer: asyncio.StreamWriter, chunk: bytes) -> None:
    if not writer.is_closing():
        writer.write(chunk)
