"""The schedulers that a client talks to."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from baton.channel import HEALTH_METHOD
from baton.credentials import Credentials, Metadata
from baton.errors import InvalidRequestError
from baton_protos.admin_pb2_grpc import AdminStub
from baton_protos.generation_pb2_grpc import GenerationStub


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One scheduler: its address, and how to call it."""

    target: str
    channel: Any
    stub: Any
    admin: Any
    health: Any
    metadata: Metadata


class Endpoints:
    """All schedulers that may serve a request. Streams begin at each in turn; calls go to the last that answered.

    Attributes:
        farewells: calls on their way that only ``close`` of the client waits for.
    """

    def __init__(self, targets: str | Sequence[str], credentials: Credentials, open: Callable[..., Any]) -> None:
        """Open a channel to each with ``open(target, credentials)``.

        Raises:
            CredentialsError: the credentials cannot be used.
            InvalidRequestError: there is no target.
        """
        self.targets = parse_targets(targets)
        self._endpoints = [_connect(target, credentials, open) for target in self.targets]
        self._turns = itertools.count(random.randrange(len(self._endpoints)))
        self._good = self._endpoints[0]
        self.farewells: set[Any] = set()

    def __len__(self) -> int:
        return len(self._endpoints)

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._endpoints)

    def mark_good(self, endpoint: Endpoint) -> None:
        """It has answered."""
        self._good = endpoint

    def bid_farewell(self, call: Any) -> None:
        """Keep a call that nobody waits for: it would be cancelled with its last reference."""
        self.farewells.add(call)
        call.add_done_callback(self.farewells.discard)

    def preferred(self) -> list[Endpoint]:
        """All of them, the good one first."""
        return [self._good, *(endpoint for endpoint in self._endpoints if endpoint is not self._good)]

    def in_turn(self) -> Iterator[Endpoint]:
        """All of them again and again, beginning with the next in turn."""
        first = next(self._turns) % len(self._endpoints)
        return itertools.cycle([*self._endpoints[first:], *self._endpoints[:first]])


def parse_targets(targets: str | Sequence[str]) -> tuple[str, ...]:
    """``"host:port"``, several of them separated by commas, or a list; each once.

    Raises:
        InvalidRequestError: there is none.
    """
    parts = targets.split(",") if isinstance(targets, str) else targets
    found = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not found:
        raise InvalidRequestError("a client needs the address of a scheduler, such as '127.0.0.1:50051'")
    return found


def _connect(target: str, credentials: Credentials, open: Callable[..., Any]) -> Endpoint:
    metadata = credentials.metadata(target)
    channel = open(target, credentials)
    stub = GenerationStub(channel)  # type: ignore[no-untyped-call]
    admin = AdminStub(channel)  # type: ignore[no-untyped-call]
    return Endpoint(target, channel, stub, admin, channel.unary_unary(HEALTH_METHOD), metadata)
