"""Work on a CPU as a list of native calls that can be repeated: what a CUDA graph is on a GPU.

While work is recorded it runs as always, but memory for results comes from a ``Scratch`` and stays theirs, and native
calls are noted with their arguments. A repetition makes the same calls on the same memory, with none of the Python that
led to them, and without the GIL, which other threads may want. Operations of torch that compute something are repeated
too, each through its dispatch.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.native import library

_ALIGNMENT = 64  # bytes, a cache line
_REPLAY = library.NativeFunction("baton_replay", "pi")
_UNREPEATABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class NotRepeatableError(RuntimeError):
    """The work asked for a value, for a shape that depends on values, for random numbers, or for several new tensors in
    one operation.
    """


class Scratch:
    """Memory for results of recorded work, used again within a recording and by others: they run one at a time."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._slots: dict[int, NDArray[np.uint8]] = {}  # by address

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised and aligned to a cache line; free again once no tensor uses it any more."""
        count = math.prod(shape)
        size = 1 << (max(_ALIGNMENT, count * dtype.itemsize) - 1).bit_length()
        free = self._free.setdefault(size, [])
        slot = free.pop() if free else self._allocate(size)
        lease = slot[:]  # an object of its own, which lives as long as a tensor uses the memory
        weakref.finalize(lease, free.append, slot)
        return torch.from_numpy(lease).view(dtype)[:count].view(*shape)

    def without_claim(self, tensor: Tensor) -> Tensor:
        """The same tensor, but its memory is free for others once ``tensor`` itself is gone: for results that are read
        before other work runs. A tensor whose memory is not from here is returned as it is.
        """
        slot = self._slots.get(_address(tensor))
        if slot is None:
            return tensor
        whole = torch.from_numpy(slot[:]).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _allocate(self, size: int) -> NDArray[np.uint8]:
        slot = _aligned(size)
        self._slots[slot.ctypes.data] = slot
        return slot


@dataclass(frozen=True, slots=True)
class NativeCall:
    """A native function, and the arguments that it got."""

    function: library.NativeFunction
    arguments: tuple[float | None, ...]


class Recording:
    """Calls in their order, and the tensor that they fill."""

    def __init__(self, calls: Iterable[NativeCall | Callable[[], object]], output: Tensor, scratch: Scratch) -> None:
        self._calls: list[Callable[[], object]] = []
        natives: list[NativeCall] = []
        for call in calls:
            if isinstance(call, NativeCall):
                natives.append(call)
                continue
            if natives:
                self._calls.append(join(natives))
                natives = []
            self._calls.append(call)
        if natives:
            self._calls.append(join(natives))
        self.output = output
        self._scratch = scratch  # calls have addresses in its memory

    def replay(self) -> None:
        """Make the calls again: they read anew whatever the work read, and fill ``output`` again.

        Its values last until something else is recorded or repeated with the same scratch.
        """
        for call in self._calls:
            call()


def join(calls: Sequence[NativeCall]) -> Callable[[], object]:
    """One call that makes all of ``calls``: in C++, with the GIL released from the first to the last."""
    invokes = [library.signature(call.function.letters) for call in calls]
    if not all(invokes):  # replay.cpp does not know the types of one
        bound = [call.function.bind(*call.arguments) for call in calls]
        return partial(_call_all, bound)
    words = [np.array(_words(call), np.uint64) for call in calls]
    rows = [
        (call.function.address(), invoke, own.ctypes.data)
        for call, invoke, own in zip(calls, invokes, words, strict=True)
    ]
    table = np.array(rows, np.uint64)
    return partial(_replay_table, _REPLAY.bind(table.ctypes.data, len(rows)), (table, words))


def record(work: Callable[[], Tensor], scratch: Scratch) -> Recording:
    """Run ``work`` and hold on to what it did.

    It must read nothing but memory that stays where it is, and must do the same whatever values it finds there.

    Raises:
        NotRepeatableError: it does not.
    """
    recorder = _Recorder(scratch)
    with recorder, library.observing(recorder.note):
        output = work()
    return Recording(recorder.calls, scratch.without_claim(output), scratch)


class _Recorder(TorchDispatchMode):
    """Sees every operation of torch, and is told of every native call."""

    def __init__(self, scratch: Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch = scratch
        self.calls: list[NativeCall | Callable[[], object]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See TorchDispatchMode: nothing is compiled here, and wrapping for it would import the whole compiler."""
        return False

    def note(self, function: library.NativeFunction, arguments: tuple[float | None, ...]) -> None:
        """``function`` is about to be called."""
        self.calls.append(NativeCall(function, arguments))

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and note it if it is more than another view of what there is."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return self._scratch.empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.ops.aten.empty_like.default:
            return self._scratch.empty(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if any(tag in func.tags for tag in _UNREPEATABLE):
            raise NotRepeatableError(f"{func} cannot be repeated")
        result = func(*args, **kwargs)
        known = {_address(tensor) for tensor in _tensors([*args, *kwargs.values()])}
        if any(_address(tensor) not in known for tensor in _tensors([result])):
            if not isinstance(result, Tensor):
                raise NotRepeatableError(f"{func} cannot be repeated")
            self.calls.append(partial(_refill, result, partial(func, *args, **kwargs)))
        elif func._schema.is_mutable:
            self.calls.append(partial(func, *args, **kwargs))
        return result


def _words(call: NativeCall) -> list[int]:
    """Each argument in eight bytes."""
    pairs = zip(call.function.letters, call.arguments, strict=True)
    return [
        int(np.float32(value).view(np.uint32)) if letter == "f" else int(value or 0) % (1 << 64)
        for letter, value in pairs
    ]


def _replay_table(replay: Callable[[], object], memory: object) -> None:
    """``memory`` is what the table and its pointers lie in."""
    replay()


def _call_all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _refill(output: Tensor, work: Callable[[], Tensor]) -> None:
    output.copy_(work())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _aligned(size: int) -> NDArray[np.uint8]:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
