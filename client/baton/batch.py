"""Running many requests through one client, a bounded number of them at a time."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeAlias

from baton.client import Client, PendingCompletion
from baton.errors import BatonError, OverloadedError
from baton.options import GenerateOptions
from baton.values import Completion, Prompt

# How a request ended: with its completion, or with the error that the client would have raised.
Outcome: TypeAlias = Completion | BatonError

_POLL_SECONDS = 0.1
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch."""

    prompt: Prompt
    options: GenerateOptions


def run_batch(
    client: Client,
    requests: Sequence[BatchRequest],
    *,
    in_flight: int,
    on_outcome: Callable[[int, Outcome], None],
    timeout: float | None = None,
) -> None:
    """Runs all requests and returns when the last has ended.

    A request that fails does not stop the others. One that is refused because the cluster's queue is full is sent
    again when the cluster says. Whatever interrupts the batch, such as Ctrl-C, cancels what runs of it.

    Args:
        in_flight: most requests to have at the cluster at a time.
        on_outcome: called in this thread with index and outcome of each request as it ends; what it raises, interrupts.
        timeout: seconds for each request; None = no limit.
    """
    batch = _Batch(client, requests, in_flight, on_outcome, timeout)
    try:
        batch.run()
    finally:
        batch.cancel()


class _Batch:
    """Indices of requests move from waiting to running, and from there, by way of ended, to their outcome."""

    def __init__(
        self,
        client: Client,
        requests: Sequence[BatchRequest],
        in_flight: int,
        on_outcome: Callable[[int, Outcome], None],
        timeout: float | None,
    ) -> None:
        self._client = client
        self._requests = requests
        self._in_flight = in_flight
        self._on_outcome = on_outcome
        self._timeout = timeout
        self._waiting = deque(range(len(requests)))
        self._running: dict[int, PendingCompletion] = {}
        self._ended: SimpleQueue[int] = SimpleQueue()  # filled by gRPC's threads
        self._paused_until = 0.0

    def run(self) -> None:
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._in_flight and time.monotonic() >= self._paused_until:
                self._submit(self._waiting.popleft())
            try:
                self._settle(self._ended.get(timeout=_POLL_SECONDS))
            except Empty:
                continue

    def cancel(self) -> None:
        for pending in self._running.values():
            pending.cancel()

    def _submit(self, index: int) -> None:
        request = self._requests[index]
        try:
            pending = self._client.submit(request.prompt, timeout=self._timeout, **request.options)
        except BatonError as error:  # it does not even fit into a message
            self._on_outcome(index, error)
            return
        self._running[index] = pending
        pending.when_done(lambda: self._ended.put(index))

    def _settle(self, index: int) -> None:
        try:
            outcome: Outcome = self._running.pop(index).result()
        except OverloadedError as error:
            wait = _RETRY_SECONDS if error.retry_after is None else error.retry_after
            self._paused_until = time.monotonic() + wait
            self._waiting.appendleft(index)
            return
        except BatonError as error:
            outcome = error
        self._on_outcome(index, outcome)
