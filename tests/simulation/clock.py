"""Virtual time: an asyncio event loop that never waits, and the stand-ins that keep real modules on its clock."""

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

from baton import endpoints, resume, stream_log
from executor_service import scheduler_choice, session
from scheduler_service.api import engine_client, intake, records, running_request, streams
from scheduler_service.engine import loop as engine_loop

START = 1000.0  # seconds; nothing may mistake an early moment for "never"

_TIMED = (engine_client, intake, records, resume, running_request, streams)
_SECRETIVE = (intake, scheduler_choice, session)
_RANDOM = (endpoints, stream_log)
_NETWORKED = (engine_client, engine_loop)


class StandstillError(AssertionError):
    """Somebody waits, and nothing will ever happen again."""


class VirtualLoop(asyncio.base_events.BaseEventLoop):
    """Jumps from one moment at which something happens to the next.

    Attributes:
        num_events: arrivals, steps, turns of engines and faults so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_events = 0
        self.readers: dict[int, Callable[[], object]] = {}  # what stands in for file descriptors
        self._moment = START
        self._clock_resolution = 1e-9
        self._selector = self

    def time(self) -> float:
        return self._moment

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise StandstillError("nothing will ever happen again")
        if timeout > 0:
            self._moment += timeout
        return []

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: Any) -> bool:
        return self.readers.pop(fd, None) is not None

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class _Clock:
    """The part of ``time`` that is used."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.monotonic = self.time = loop.time


class _Secrets:
    """The part of ``secrets`` that is used."""

    def __init__(self, rng: random.Random) -> None:
        self.randbits = rng.getrandbits
        self._rng = rng

    def token_hex(self, size: int) -> str:
        return self._rng.randbytes(size).hex()


class _Random:
    """The part of ``random`` that is used."""

    def __init__(self, rng: random.Random) -> None:
        self.randrange = rng.randrange
        self._rng = rng

    def Random(self) -> random.Random:  # noqa: N802 - as in random
        return random.Random(self._rng.getrandbits(64))


@contextmanager
def virtual_world(loop: VirtualLoop, rng: random.Random, zmq: object) -> Iterator[None]:
    """While it lasts, the real modules have this loop's clock, reproducible randomness and virtual sockets."""
    replacements: list[tuple[ModuleType, str, object]] = [
        *((module, "time", _Clock(loop)) for module in _TIMED),
        *((module, "secrets", _Secrets(rng)) for module in _SECRETIVE),
        *((module, "random", _Random(rng)) for module in _RANDOM),
        *((module, "zmq", zmq) for module in _NETWORKED),
    ]
    with ExitStack() as stack:
        for module, name, value in replacements:
            stack.enter_context(patch.object(module, name, value))
        yield
