"""Memory for what kernels read at the machine's full speed."""

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20  # bytes, on x86-64


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, in huge pages where the system has them.

    Tensors of gigabytes do not fit into the processor's table of small pages: walking page tables for them costs a
    quarter of the bandwidth. A page takes RAM, and time, when it is first written: hundreds of times less often than a
    small one. Only whole huge pages are asked for, so no memory is lost to rounding. Raises ``MemoryError``.
    """
    size = prod(shape) * dtype.itemsize
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
