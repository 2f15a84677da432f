"""How many tokens a request has: distributions over token counts."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np

from baton.errors import InvalidRequestError

SYNTAX = "128, uniform:32-256, normal:MEAN,STDDEV, or lognormal:MEDIAN,SIGMA"
MAX_TOKENS = 1 << 24  # far beyond any context, and harmless to allocate


class _Shape(StrEnum):
    FIXED = "fixed"
    UNIFORM = "uniform"
    NORMAL = "normal"
    LOGNORMAL = "lognormal"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution over token counts; made by ``parse``.

    Attributes:
        shape: which family.
        location: the value; the least value; the mean; the median.
        scale: unused; the greatest value; the standard deviation; that of the logarithm.
    """

    shape: _Shape
    location: float
    scale: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what ``SYNTAX`` describes.

        Raises:
            InvalidRequestError: it is something else.
        """
        name, colon, arguments = text.partition(":")
        try:
            if not colon:
                return cls(_Shape.FIXED, _positive(int(name)))
            shape = _Shape(name)
            separator = "-" if shape is _Shape.UNIFORM else ","
            first, second = arguments.split(separator)
            if shape is _Shape.UNIFORM:
                least, most = _positive(int(first)), _positive(int(second))
                if least <= most:
                    return cls(shape, least, most)
            elif shape is not _Shape.FIXED and 0 <= float(second) <= MAX_TOKENS:
                return cls(shape, _positive(float(first)), float(second))
        except ValueError:
            pass
        raise InvalidRequestError(f"{text!r} is no distribution of lengths: {SYNTAX}")

    def __str__(self) -> str:
        match self.shape:
            case _Shape.FIXED:
                return f"{self.location:g}"
            case _Shape.UNIFORM:
                return f"{self.location:g} to {self.scale:g}"
            case _:
                return f"{self.shape}({self.location:g}, {self.scale:g})"

    def draw(self, random: np.random.Generator) -> int:
        """A token count, 1 to ``MAX_TOKENS``."""
        match self.shape:
            case _Shape.FIXED:
                return int(self.location)
            case _Shape.UNIFORM:
                return int(random.integers(int(self.location), int(self.scale), endpoint=True))
            case _Shape.NORMAL:
                return _count(random.normal(self.location, self.scale))
            case _Shape.LOGNORMAL:
                return _count(random.lognormal(math.log(self.location), self.scale))


def _count(drawn: float) -> int:
    return round(min(max(drawn, 1.0), MAX_TOKENS))


def _positive(value: float) -> float:
    if not 0 < value <= MAX_TOKENS:
        raise ValueError
    return value
