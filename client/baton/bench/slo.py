"""Service level objectives: how fast a request must be to count."""

from dataclasses import dataclass, fields
from typing import Self

from baton.errors import InvalidRequestError

SYNTAX = "ttft=200ms,itl=50ms,e2e=10s"
_UNITS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds that a request may take; None = as long as it likes.

    Attributes:
        ttft: to its first token.
        itl: between tokens, its mean.
        e2e: to its end.
    """

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what ``SYNTAX`` shows; any of the three may be left out.

        Raises:
            InvalidRequestError: it is something else.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            seconds = _seconds(value)
            if name not in {field.name for field in fields(cls)} or name in limits or seconds is None:
                raise InvalidRequestError(f"{text!r} is no objective: {SYNTAX}")
            limits[name] = seconds
        return cls(**limits)


def _seconds(text: str) -> float | None:
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            try:
                seconds = float(text.removesuffix(unit)) * factor
            except ValueError:
                return None
            return seconds if 0 < seconds < float("inf") else None
    return None
