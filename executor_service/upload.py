"""Host arrays on their way to the device."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Uploader:
    """Copies to a device without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, array: NDArray[Any]) -> Tensor:
        """``array`` on the device. It must not change afterwards: on a CPU the tensor shares its memory."""
        host = torch.from_numpy(array)
        if self.device.type == "cpu":
            return host
        # fresh pinned memory per copy: the caching host allocator reuses it only after the copy has run
        return host.pin_memory().to(self.device, non_blocking=True)
