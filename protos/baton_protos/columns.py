"""Packed little-endian number columns in protobuf ``bytes`` fields, read as numpy views without a copy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

INT32 = np.dtype("<i4")
UINT32 = np.dtype("<u4")
INT64 = np.dtype("<i8")
UINT8 = np.dtype("u1")
FLOAT32 = np.dtype("<f4")


def pack(values: NDArray[Any] | list[int] | list[float], dtype: np.dtype[Any] = INT32) -> bytes:
    """The column's bytes; ``values`` is a one-dimensional array or a list of numbers."""
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def unpack(column: bytes, dtype: np.dtype[Any] = INT32) -> NDArray[Any]:
    """A read-only view of the column.

    Raises:
        ValueError: the length is not a whole number of elements.
    """
    return np.frombuffer(column, dtype=dtype)
