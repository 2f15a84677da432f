"""Memory for what kernels read and write at the machine's full speed."""

import math
import mmap
import threading
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HUGE_PAGE = 2 << 20  # bytes, on x86-64
_ALIGNMENT = 64  # bytes, a cache line
_INTEGERS = {size: np.dtype(f"i{size}") for size in (1, 2, 4, 8)}  # by bytes

# Within the ``with`` block a TorchDispatchMode does not see operations of torch: of views it learns nothing, at a cost.
unobserved = torch._C._DisableTorchDispatch


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, in huge pages where the system has them.

    Tensors of gigabytes do not fit into the processor's table of small pages: walking page tables for them costs a
    quarter of the bandwidth. A page takes RAM, and time, when it is first written: hundreds of times less often than a
    small one. Only whole huge pages are asked for, so no memory is lost to rounding. Raises ``MemoryError``.
    """
    size = math.prod(shape) * dtype.itemsize
    whole = size // _HUGE_PAGE * _HUGE_PAGE
    if whole == 0:
        return torch.zeros(shape, dtype=dtype)
    try:
        pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {size} bytes") from error
    memory = torch.frombuffer(pages, dtype=torch.uint8)  # keeps `pages` mapped
    start = -memory.data_ptr() % _HUGE_PAGE
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return memory[start : start + size].view(dtype).view(shape)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a kernel's result on the CPU: of the thread's scratch if it has one (``results_in``)."""
    scratch = _current.scratch
    return torch.empty(shape, dtype=dtype) if scratch is None else scratch.empty(shape, dtype)


class Scratch:
    """Memory for results of work that is done again and again, one piece of it at a time.

    A result keeps its memory for as long as any tensor uses it, on whatever thread; then the next one gets it, while
    caches still hold it. Nothing goes back to the system, which would clear every page before it hands it out again:
    about twice what was ever needed at once is held, whatever the sizes.
    """

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._leases: dict[int, _Lease] = {}
        self._ended: deque[_Lease] = deque()
        self._rows, self._most_rows = -1, 0  # see `with_room`

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(region.bytes.size for region in self._regions)

    @property
    def is_idle(self) -> bool:
        """Whether no result is in use."""
        return not self._leases

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised and aligned to a cache line. Raises ``MemoryError``."""
        count = math.prod(shape)
        if shape and shape[0] == self._rows:
            count = count // self._rows * self._most_rows
        room = -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT or _ALIGNMENT
        self._reclaim()
        for region in self._regions:
            start = region.take(room)
            if start is not None:
                break
        else:
            region = _Region(max(room, self.size, _HUGE_PAGE))  # at least as much again: growing ends soon
            self._regions.append(region)
            start = region.take(room)
            assert start is not None
        # an object of its own, which the tensors hold that use it; NumPy has no bfloat16
        lease: NDArray[Any] = np.ndarray(shape, _INTEGERS[dtype.itemsize], region.bytes, start)
        end = weakref.ref(lease, self._end)
        self._leases[id(end)] = (end, region, start, room)
        with unobserved():
            return torch.from_numpy(lease).view(dtype)

    def without_claim(self, tensor: Tensor) -> Tensor:
        """The same tensor, but its memory is free for others once ``tensor`` itself is gone. A tensor whose memory is
        not from here is returned as it is.
        """
        for region in self._regions:
            if (start := region.place(tensor)) is not None:
                free = torch.from_numpy(region.bytes[start : start + tensor.untyped_storage().nbytes()])
                return free.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return tensor

    @contextmanager
    def with_room(self, rows: int, most_rows: int) -> Iterator[None]:
        """Within the ``with`` block a result of so many rows takes the room of one of ``most_rows``."""
        self._rows, self._most_rows = rows, most_rows
        try:
            yield
        finally:
            self._rows = -1

    def touch(self) -> None:
        """Take RAM for all that is held, which must be idle: from then on no page of it has to be found or cleared."""
        assert self.is_idle
        for region in self._regions:
            region.bytes.fill(0)

    def _end(self, lease: "weakref.ref[NDArray[Any]]") -> None:
        """On whatever thread, at any moment: what is being changed elsewhere must be left alone."""
        self._ended.append(self._leases.pop(id(lease)))

    def _reclaim(self) -> None:
        while self._ended:
            _, region, start, room = self._ended.popleft()
            region.give(start, room)


class _Region:
    """Adjacent memory, parts of which are taken; starts and sizes are multiples of the alignment."""

    def __init__(self, size: int) -> None:
        self.bytes: NDArray[np.uint8] = zeros((size,), torch.uint8).numpy()
        self._address = self.bytes.ctypes.data
        # Ranges that nobody has, ascending, never adjacent.
        self._starts = [0]
        self._ends = [size]

    def place(self, tensor: Tensor) -> int | None:
        """Where the memory of ``tensor`` starts, if it is part of this."""
        start = tensor.untyped_storage().data_ptr() - self._address
        return start if 0 <= start < self.bytes.size else None

    def take(self, size: int) -> int | None:
        """Take the first free range of ``size`` bytes, if there is one: work of any size stays in the same memory."""
        for i, start in enumerate(self._starts):
            if self._ends[i] - start > size:
                self._starts[i] = start + size
                return start
            if self._ends[i] - start == size:
                del self._starts[i], self._ends[i]
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Free what was taken."""
        end = start + size
        i = bisect(self._starts, start)
        follows = i > 0 and self._ends[i - 1] == start
        precedes = i < len(self._starts) and self._starts[i] == end
        if follows and precedes:
            del self._ends[i - 1], self._starts[i]
        elif follows:
            self._ends[i - 1] = end
        elif precedes:
            self._starts[i] = start
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)


_Lease = tuple["weakref.ref[NDArray[Any]]", _Region, int, int]  # what tells of its end, and the memory


class _Current(threading.local):
    """Each thread's own."""

    scratch: Scratch | None = None


_current = _Current()


@contextmanager
def results_in(scratch: Scratch) -> Iterator[None]:
    """Within the ``with`` block, kernels that this thread calls take memory for their results from ``scratch``."""
    outer, _current.scratch = _current.scratch, scratch
    try:
        yield
    finally:
        _current.scratch = outer
