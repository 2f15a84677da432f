"""The library of C++ kernels in use, if any.

They work on bfloat16. Where they cannot (no compiler, no AVX2, another dtype or device), the torch reference does.
``BATON_KERNELS=reference`` switches them off; ``BATON_KERNELS=native`` makes their absence an error, and
``BATON_KERNELS=amx`` that of Intel's AMX, which linear layers then use; it has never run on such a CPU yet.
``BATON_KERNELS=triton`` puts the GPU's kernels in their place (``kernels.gpu.library``). Both sides of one stream must
use the same: their results agree to rounding, not bit by bit.
"""

import ctypes
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kernels.gpu import library as gpu_library
from kernels.native.build import BuildError, build, choose_amx, choose_isa

logger = logging.getLogger(__name__)

_ARGUMENT_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "n": ctypes.c_int}
_WORDS = {"p": "Q", "i": "q", "f": "f4x", "n": "i4x"}  # of eight bytes, for ``struct``


def available() -> bool:
    """Whether the native kernels are in use; the first call may build them."""
    return _load()[0] is not None


def selection(x: Tensor) -> str:
    """Which kernels work on tensors like ``x``: ``native avx512_bf16``, ``triton 3.6.0`` or ``reference (why)``."""
    if gpu_library.handles(x):
        return gpu_library.selection()
    if x.is_cpu and x.dtype is torch.bfloat16:
        return _load()[1]
    return f"reference ({x.device.type} {str(x.dtype).removeprefix('torch.')})"


def handles(x: Tensor) -> bool:
    """Whether native kernels work on ``x``: bfloat16 on CPU."""
    return x.dtype is torch.bfloat16 and x.is_cpu and available()


def handles_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether native kernels work on tensors of ``dtype`` on ``device``."""
    return device.type == "cpu" and dtype is torch.bfloat16 and available()


def handles_cache(cache: Tensor) -> bool:
    """Whether native kernels keep keys and values in ``cache``, [..., head_dim], in a layout of their own."""
    return handles(cache) and cache.shape[-1] % 16 == 0


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    asked = os.environ.get("BATON_KERNELS", "")
    if asked not in {"", "native", "amx", "reference", "triton"}:
        raise ValueError(f"BATON_KERNELS must be native, amx, reference or triton, not {asked!r}")
    if asked in {"reference", "triton"}:
        return None, "reference (BATON_KERNELS)"
    try:
        isa = choose_amx() if asked == "amx" else choose_isa()
        return ctypes.CDLL(str(build(isa))), f"native {isa}"
    except (BuildError, OSError) as error:
        if asked in {"native", "amx"}:
            raise
        logger.warning("no native kernels, the torch reference runs instead, many times slower: %s", error)
        return None, f"reference ({error})"


class NativeFunction:
    """A function of the library, looked up when it is first called. Calls release the GIL.

    Argument types: ``p`` a pointer (``Tensor.data_ptr()``, or None), ``i`` an int64, ``f`` a float32, ``n`` an int.
    """

    def __init__(self, name: str, arguments: str) -> None:
        self.name = name
        self.letters = arguments
        self._types: tuple[Any, ...] = tuple(_ARGUMENT_TYPES[kind] for kind in arguments)
        self._words = struct.Struct("<" + "".join(_WORDS[kind] for kind in arguments))

    def __call__(self, *arguments: float | None) -> None:
        if _noted.by is None:
            self.call(*arguments)
        else:
            _noted.by(self, arguments)

    def call(self, *arguments: float | None) -> None:
        """Make the call, whoever wants to note calls."""
        _resolve(self.name, self._types)(*arguments)

    def bind(self, *arguments: float | None) -> Callable[[], object]:
        """A call with these arguments, converted once. Whoever keeps it keeps the memory that pointers point into."""
        values = (kind(value) for kind, value in zip(self._types, arguments, strict=True))
        return partial(_resolve(self.name, None), *values)

    def words(self, arguments: tuple[float | None, ...]) -> bytes:
        """The arguments, eight bytes each."""
        return self._words.pack(*[argument or 0 for argument in arguments])

    def address(self) -> int:
        """Where the function's code is."""
        return ctypes.cast(_resolve(self.name, None), ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def signature(letters: str) -> int:
    """Address of what ``baton_replay`` calls a function of these argument types by; 0 where it does not know them."""
    find: Any = _resolve("baton_signature", (ctypes.c_char_p,))
    find.restype = ctypes.c_void_p
    return int(find(letters.encode()) or 0)


_Note = Callable[[NativeFunction, tuple[float | None, ...]], None]


class _Noted(threading.local):
    """Each thread's own: calls of others are made."""

    by: _Note | None = None


_noted = _Noted()


@contextmanager
def noting(note: _Note) -> Iterator[None]:
    """Hand every native call of this thread within the ``with`` block to ``note``, and do not make it."""
    outer, _noted.by = _noted.by, note
    try:
        yield
    finally:
        _noted.by = outer


@cache
def _resolve(name: str, types: tuple[Any, ...] | None) -> Callable[..., None]:
    """The function called ``name``, converting its arguments to ``types``, or taking values of ctypes as they are."""
    library, why = _load()
    if library is None:
        raise RuntimeError(f"{name} needs native kernels: {why}")
    entry: Any = library[name]  # an object of its own: ``library.name`` would be one for all
    entry.argtypes = types
    entry.restype = None
    function: Callable[..., None] = entry
    return function
