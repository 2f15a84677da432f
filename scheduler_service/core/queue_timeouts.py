"""Requests that must have started by a certain time."""

import heapq

from scheduler_service.core.request import Request, RequestStatus


class QueueTimeouts:
    """A heap by deadline. Requests that have started or ended leave it when their time comes, or in bulk."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []  # (deadline, arrival, request); arrivals are unique
        self._next_sweep = 1024

    def add(self, request: Request, starts_by: float) -> None:
        """The request fails unless it starts before that time."""
        heapq.heappush(self._heap, (starts_by, request.arrival, request))
        if len(self._heap) >= self._next_sweep:
            self._heap = [entry for entry in self._heap if _waits(entry[2])]
            heapq.heapify(self._heap)
            self._next_sweep = 2 * len(self._heap) + 1024

    def pop_due(self, now: float) -> list[Request]:
        """Requests that have not started in time."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if _waits(request):
                due.append(request)
        return due


def _waits(request: Request) -> bool:
    return request.started_at is None and request.status is not RequestStatus.FINISHED
