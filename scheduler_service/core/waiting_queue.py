"""Requests that wait: by priority, then first come first served. Whoever comes back keeps the place of its arrival."""

import heapq
from collections import Counter

from scheduler_service.core.request import Request


class WaitingQueue:
    """A heap whose entries count only while their request is in the queue, so that leaving it costs nothing.

    Held requests are in the queue but never next; ``is_held`` must not change while a request is in it.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Request] = {}  # by arrival, which is unique
        self._held: dict[int, Request] = {}
        self._heap: list[tuple[int, int]] = []  # (priority, arrival)
        self._counts: Counter[int] = Counter()  # by priority, without held ones

    def __len__(self) -> int:
        return len(self._waiting) + len(self._held)

    def push(self, request: Request) -> None:
        """Add a request that is not in the queue."""
        if request.is_held:
            self._held[request.arrival] = request
            return
        self._waiting[request.arrival] = request
        self._counts[request.priority] += 1
        heapq.heappush(self._heap, (request.priority, request.arrival))

    def peek(self) -> Request | None:
        """The request that is next."""
        while self._heap:
            request = self._waiting.get(self._heap[0][1])
            if request is not None:
                return request
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Request:
        """Take the request that is next.

        Raises:
            IndexError: nobody is.
        """
        request = self.peek()
        if request is None:
            raise IndexError("the queue is empty")
        self.discard(request)
        return request

    def discard(self, request: Request) -> None:
        """Take out a request that is in the queue."""
        if request.is_held:
            del self._held[request.arrival]
            return
        del self._waiting[request.arrival]
        self._counts[request.priority] -= 1
        if not self._counts[request.priority]:
            del self._counts[request.priority]
        if len(self._heap) > 2 * len(self._waiting) + 16:
            self._heap = [(one.priority, one.arrival) for one in self._waiting.values()]
            heapq.heapify(self._heap)

    def num_up_to(self, priority: int) -> int:
        """Requests that may be next, with this priority or one that runs earlier."""
        return sum(count for level, count in self._counts.items() if level <= priority)

    def requests(self) -> list[Request]:
        """All requests in order, held ones in their places."""
        everybody = [*self._waiting.values(), *self._held.values()]
        return sorted(everybody, key=lambda request: (request.priority, request.arrival))


class Backlog:
    """An executor's requests that do not run: the common queue, and apart from it those that must run alone.

    Whether a request must must not change while it is in here.
    """

    def __init__(self) -> None:
        self.waiting = WaitingQueue()
        self.suspects = WaitingQueue()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.suspects)

    def push(self, request: Request) -> None:
        """Add a request."""
        self._queue_of(request).push(request)

    def discard(self, request: Request) -> None:
        """Take out a request."""
        self._queue_of(request).discard(request)

    def requests(self) -> list[Request]:
        """Everybody: first the common queue in order, then the others."""
        return self.waiting.requests() + self.suspects.requests()

    def _queue_of(self, request: Request) -> WaitingQueue:
        return self.suspects if request.is_quarantined else self.waiting
