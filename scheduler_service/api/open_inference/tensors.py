"""Tensors as the protocol has them: a name, a datatype, a shape, and elements in row-major order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scheduler_service.api.errors import RequestError, invalid

Element = bool | int | float | str

PROMPT_IDS = "input_ids"
BYTES, BOOL, INT32, UINT32, FP32 = "BYTES", "BOOL", "INT32", "UINT32", "FP32"
_DTYPES = {
    BOOL: np.dtype("?"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    INT32: np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    UINT32: np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    FP32: np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_LENGTH_BYTES = 4  # before each element of BYTES, little-endian
# Elements become Python objects on the event loop.
_MAX_PROMPT_IDS = 1 << 20
_MAX_NUMBERS = 1 << 16  # of any other tensor
_MAX_TEXTS = 1024
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor; elements of BYTES are texts."""

    name: str
    datatype: str
    elements: Sequence[Element]


def from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes) -> Tensor:
    """A tensor out of its binary form.

    Raises:
        RequestError: INVALID_ARGUMENT, the data are not of this datatype and shape, or too many.
    """
    count = _count(name, datatype, shape)
    if datatype == BYTES:
        return Tensor(name, datatype, [_text(name, part) for part in _split(name, count, data)])
    dtype = _DTYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise _bad(name, f"has {len(data)} bytes instead of {count} elements of {datatype}")
    elements: list[Element] = np.frombuffer(data, dtype).tolist()
    return Tensor(name, datatype, elements)


def from_elements(name: str, datatype: str, shape: Sequence[int], elements: Sequence[Element | bytes]) -> Tensor:
    """A tensor out of its elements.

    Raises:
        RequestError: INVALID_ARGUMENT, the elements are not those of the shape, or too many.
    """
    if len(elements) != (count := _count(name, datatype, shape)):
        raise _bad(name, f"has {len(elements)} elements of {datatype} instead of {count}")
    return Tensor(name, datatype, [_text(name, one) if isinstance(one, bytes) else one for one in elements])


def to_raw(tensor: Tensor) -> bytes:
    """The binary form."""
    if tensor.datatype != BYTES:
        return np.array(tensor.elements, _DTYPES[tensor.datatype]).tobytes()
    texts = [str(element).encode() for element in tensor.elements]
    return b"".join(len(text).to_bytes(_LENGTH_BYTES, "little") + text for text in texts)


def _count(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Elements of a shape."""
    if datatype != BYTES and datatype not in _DTYPES:
        raise _bad(name, "has no datatype that is known here")
    if len(shape) > _MAX_DIMENSIONS:
        raise _bad(name, f"has more than {_MAX_DIMENSIONS} dimensions")
    count = math.prod(shape)
    most = _MAX_TEXTS if datatype == BYTES else _MAX_PROMPT_IDS if name == PROMPT_IDS else _MAX_NUMBERS
    if any(size < 0 for size in shape) or count > most:
        raise _bad(name, f"must have a shape of 0 to {most} elements")
    return count


def _split(name: str, count: int, data: bytes) -> list[bytes]:
    parts: list[bytes] = []
    position = 0
    while position < len(data) and len(parts) < count:
        start = position + _LENGTH_BYTES
        position = start + int.from_bytes(data[position:start], "little")
        parts.append(data[start:position])
    if position != len(data) or len(parts) != count:
        raise _bad(name, f"does not have {count} elements, each behind its length in {_LENGTH_BYTES} bytes")
    return parts


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _bad(name, "is not UTF-8") from None


def _bad(name: str, message: str) -> RequestError:
    return invalid("inputs", f"{name[:64]!r} {message}")
