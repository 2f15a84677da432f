"""What the IO thread hands to the main thread."""

import threading
from collections import deque
from dataclasses import dataclass

from executor_service.step_plan import MalformedPlan, StepPlan

MAX_QUEUED_PLANS = 64


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """Clear rows and tables, then say Ready. Epochs are counted over all schedulers here."""

    epoch: int


@dataclass(frozen=True, slots=True)
class PlanArrival:
    """A plan of ``epoch``, received at ``arrived_at`` (time.monotonic seconds)."""

    epoch: int
    plan: StepPlan | MalformedPlan
    arrived_at: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the main loop: the process can do nothing more. ``message`` is for a person."""

    exit_code: int
    message: str


Item = NewEpoch | PlanArrival | Stop


class Inbox:
    """A bounded queue with one producer (IO thread) and one consumer (main thread), which the producer may empty."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    def offer(self, arrival: PlanArrival) -> bool:
        """Queue a plan; False when the queue is full."""
        with self._changed:
            if len(self._items) >= MAX_QUEUED_PLANS:
                return False
            self._items.append(arrival)
            self._changed.notify()
            return True

    def restart(self, epoch: int) -> None:
        """Replace whatever waits by the beginning of ``epoch``."""
        self._replace(NewEpoch(epoch))

    def stop(self, stop: Stop) -> None:
        """Replace whatever waits by the end."""
        self._replace(stop)

    def clear(self) -> None:
        """Drop what waits, except an end."""
        with self._changed:
            self._items = deque(item for item in self._items if isinstance(item, Stop))

    def take(self) -> Item:
        """The next item; waits for it."""
        with self._changed:
            while not self._items:
                self._changed.wait()
            return self._items.popleft()

    def _replace(self, item: NewEpoch | Stop) -> None:
        with self._changed:
            self._items.clear()
            self._items.append(item)
            self._changed.notify()
