"""Host arrays on their way to the device."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 64  # bytes: kernels are compiled for aligned addresses
_STAGE_BYTES = 1 << 20


class Uploader(Protocol):
    """Takes host arrays to the device without waiting for it."""

    @property
    def device(self) -> torch.device:
        """Where tensors go."""

    def __call__(self, array: NDArray[Any]) -> Tensor:
        """``array`` on the device, with its values once ``send`` has been called; until then it must not change.

        On a CPU the tensor shares the array's memory for good.
        """

    def send(self) -> None:
        """Give all tensors their values, for whatever is launched from now on."""


def uploader_to(device: torch.device) -> Uploader:
    """The way to ``device``."""
    return HostUploader() if device.type == "cpu" else StagingUploader(device)


class HostUploader:
    """Tensors that share the arrays' memory."""

    device = torch.device("cpu")

    def __call__(self, array: NDArray[Any]) -> Tensor:
        """See Uploader."""
        return torch.from_numpy(array)

    def send(self) -> None:
        """See Uploader; nothing has to move."""


class StagingUploader:
    """Gathers arrays in pinned memory: one copy takes to the device what has come since the last one.

    Arrays lie one after another in stages that are never written twice. A full stage is dropped; torch's caching host
    allocator hands its memory out again only when the copies out of it have run, the device's only when no tensor is
    left in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._size = -1  # bytes of the stage; there is none yet
        self._used = self._sent = 0

    def __call__(self, array: NDArray[Any]) -> Tensor:
        """See Uploader. The array is copied now."""
        needed = -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._used + needed > self._size:
            self._begin(needed)
        first = self._used // array.itemsize
        self._used += needed
        host, there = self._views_as(array.dtype)
        own = slice(first, first + array.size)
        host[own] = array.ravel()
        tensor = there[own]
        return tensor if array.ndim == 1 else tensor.view(array.shape)

    def send(self) -> None:
        """See Uploader."""
        if self._sent < self._used:
            part = slice(self._sent, self._used)
            self._there[part].copy_(self._host[part], non_blocking=True)
            self._sent = self._used

    def _begin(self, needed: int) -> None:
        """A new stage; what lies in the old one must not be forgotten."""
        self.send()
        self._used = self._sent = 0
        self._size = max(_STAGE_BYTES, 1 << (4 * needed).bit_length())
        self._host = torch.empty(self._size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self._there = torch.empty(self._size, dtype=torch.uint8, device=self.device)
        self._views: dict[np.dtype[Any], tuple[NDArray[Any], Tensor]] = {}

    def _views_as(self, dtype: np.dtype[Any]) -> tuple[NDArray[Any], Tensor]:
        """Both sides of the stage as arrays of ``dtype``."""
        if dtype not in self._views:
            host = self._host.numpy().view(dtype)
            self._views[dtype] = host, self._there.view(torch.from_numpy(host[:0]).dtype)
        return self._views[dtype]
