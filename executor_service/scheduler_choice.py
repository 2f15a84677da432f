"""Which of several schedulers to join: all are asked how much they need an executor. No sockets, no clock."""

import math
import random
import secrets
from collections import deque
from collections.abc import Sequence

from executor_service.wire import Census, Header, Probe, encode

_PATIENCE = 0.1  # seconds after the first answer, for the others
_ASK_INTERVAL = 0.2
_LOOK_INTERVAL = 1.0  # while in a session
_WELCOME_PATIENCE = 2.0


class SchedulerChoice:
    """Sends probes, gathers answers, picks. Times are ``time.monotonic`` seconds.

    Attributes:
        outgoing: (endpoint, frame) pairs, oldest first; the owner of the sockets takes them from the left.
    """

    def __init__(self, endpoints: Sequence[str], boot_id: int) -> None:
        self.outgoing: deque[tuple[str, bytes]] = deque()
        self._boot_id = boot_id
        self._rng = random.Random(boot_id)
        self._endpoints: tuple[str, ...] = ()
        self._answers: dict[str, Census] = {}
        self._nonce = secrets.randbits(64)
        self._decide_at: float | None = None
        self._next_ask = 0.0
        self._home: str | None = None
        self._chosen_at = 0.0
        self._is_looking_around = False
        self.offer(endpoints)

    @property
    def home(self) -> str | None:
        """The scheduler to talk to; None while it is being looked for."""
        return self._home

    @property
    def deadline(self) -> float:
        """When to look again; with a single scheduler there is nothing to look for."""
        if len(self._endpoints) == 1:
            return math.inf
        if self._home is not None and not self._is_looking_around:
            return self._chosen_at + _WELCOME_PATIENCE
        return self._next_ask if self._decide_at is None else min(self._next_ask, self._decide_at)

    def offer(self, endpoints: Sequence[str]) -> None:
        """These are there to choose from now."""
        self._endpoints = tuple(endpoints)
        if self._home not in self._endpoints:
            self._home = self._endpoints[0] if len(self._endpoints) == 1 else None

    def seek(self, now: float) -> None:
        """There is no session: look for a scheduler, or go on doing so."""
        if len(self._endpoints) == 1:
            return
        self._is_looking_around = False
        if self._home is not None and now >= self._chosen_at + _WELCOME_PATIENCE:
            self._home = None
            self._restart(now)
        if self._home is None and now >= self._next_ask:
            self._ask(now + _ASK_INTERVAL)
        if self._home is None and self._has_decided(now):
            self._choose(min(self._answers, key=self._need), now)

    def leave(self, now: float, redirect: str = "") -> None:
        """The session is over: to ``redirect`` if that is one of ours, else to whoever needs us."""
        if len(self._endpoints) == 1:
            return
        self._home = None
        self._restart(now)
        if redirect in self._endpoints:
            self._choose(redirect, now)

    def look_around(self, now: float) -> str | None:
        """In a session: a scheduler that has no executor while ours has several; None if there is none."""
        if len(self._endpoints) == 1:
            return None
        self._is_looking_around = True
        if now >= self._next_ask:
            self._restart(now)
            self._ask(now + _LOOK_INTERVAL * self._rng.uniform(0.8, 1.2))
        if not self._has_decided(now):
            return None
        home, neediest = self._answers.get(self._home or ""), min(self._answers, key=self._need)
        starved = self._answers[neediest].executors == 0 and home is not None and home.executors > 1
        self._decide_at = None
        return neediest if starved else None

    def awaits(self, endpoint: str) -> bool:
        """Whether its answer is still to come."""
        return len(self._endpoints) > 1 and endpoint not in self._answers

    def receive(self, endpoint: str, census: Census, now: float) -> None:
        """A scheduler has answered."""
        if census.nonce != self._nonce or endpoint not in self._endpoints:
            return
        self._answers[endpoint] = census
        if len(self._answers) == len(self._endpoints):
            self._decide_at = now
        elif self._decide_at is None:
            self._decide_at = now + _PATIENCE

    def _need(self, endpoint: str) -> tuple[int, int, float]:
        census = self._answers[endpoint]
        return census.executors, -census.queued_requests, self._rng.random()

    def _has_decided(self, now: float) -> bool:
        return self._decide_at is not None and now >= self._decide_at

    def _choose(self, endpoint: str, now: float) -> None:
        self._home = endpoint
        self._chosen_at = now
        self._decide_at = None

    def _restart(self, now: float) -> None:
        self._answers.clear()
        self._decide_at = None
        self._next_ask = now
        self._nonce = secrets.randbits(64)

    def _ask(self, next_ask: float) -> None:
        self._next_ask = next_ask
        frame = encode(Header("", self._boot_id, 0, 0, 0), Probe(self._nonce))
        self.outgoing = deque((endpoint, frame) for endpoint in self._endpoints)
