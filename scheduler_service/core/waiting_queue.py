"""Requests that wait, first come first served: whoever comes back keeps the place of its arrival."""

import heapq

from scheduler_service.core.request import Request, RequestStatus


class WaitingQueue:
    """A heap by arrival. Finished requests are dropped when they surface, so an abort costs nothing here."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Request]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        """Arrivals are unique, so two requests are never compared."""
        heapq.heappush(self._heap, (request.arrival, request))
        self._size += 1

    def peek(self) -> Request | None:
        """The request that is next."""
        while self._heap and self._heap[0][1].status is RequestStatus.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take the request that is next.

        Raises:
            IndexError: nobody waits.
        """
        if self.peek() is None:
            raise IndexError("the queue is empty")
        self._size -= 1
        return heapq.heappop(self._heap)[1]

    def discard(self, request: Request) -> None:
        """A waiting request was marked FINISHED."""
        self._size -= 1
        if request is self._heap[0][1]:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * self._size + 16:
            self._heap = [entry for entry in self._heap if entry[1].status is not RequestStatus.FINISHED]
            heapq.heapify(self._heap)

    def requests(self) -> list[Request]:
        """All waiting requests in order."""
        return [r for _, r in sorted(self._heap, key=lambda entry: entry[0]) if r.status is not RequestStatus.FINISHED]
