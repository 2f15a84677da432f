"""Tells a step that is stuck from one that is long, by what steps of its size took before."""

from collections import deque

_LEAST_SECONDS = 3.0
_MARGIN = 10.0
# Until a step of a size or larger has been seen: kernels may still have to be built, memory to be mapped.
_UNSEEN_SECONDS = 30.0
_FORGET = 0.99  # per observed step of the size: a cost that does not come again fades within some hundred steps


class StepCosts:
    """What steps cost, in seconds, by the power of two below their number of tokens."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step has run."""
        size = _size(num_tokens)
        self._seconds[size] = max(seconds, self._seconds.get(size, 0.0) * _FORGET)

    def patience(self, num_tokens: int) -> float:
        """How long a step of this size may take before it counts as stuck.

        A size not seen yet costs at most what the next larger one does; where there is none, the cost grows from that
        of the next smaller one with the number of tokens.
        """
        size = _size(num_tokens)
        known = min((seen for seen in self._seconds if seen >= size), default=None)
        if known is not None:
            return max(_LEAST_SECONDS, _MARGIN * self._seconds[known])
        smaller = max(self._seconds, default=None)
        planned = 0.0 if smaller is None else self._seconds[smaller] * 2 ** (size - smaller)
        return max(_UNSEEN_SECONDS, _MARGIN * planned)


class StepWatch:
    """The steps that one executor has in flight. Times are seconds of a steady clock."""

    def __init__(self) -> None:
        self._costs = StepCosts()
        self._in_flight: deque[tuple[int, float]] = deque()  # (tokens, dispatched at), oldest first
        self._settled_at = 0.0

    def dispatched(self, num_tokens: int, now: float) -> None:
        """A step was sent."""
        self._in_flight.append((num_tokens, now))

    def settled(self, seconds: float, now: float) -> None:
        """The oldest step was answered; the device took ``seconds`` for it."""
        if self._in_flight:
            num_tokens, _ = self._in_flight.popleft()
            self._costs.observe(num_tokens, seconds)
        self._settled_at = now

    def overdue(self, now: float) -> float:
        """For how long the oldest step has been running if it should have been done by now, else 0."""
        if not self._in_flight:
            return 0.0
        num_tokens, dispatched_at = self._in_flight[0]
        age = now - max(dispatched_at, self._settled_at)
        return age if age > self._costs.patience(num_tokens) else 0.0


def _size(num_tokens: int) -> int:
    return max(1, num_tokens).bit_length()
