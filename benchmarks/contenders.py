"""What is compared takes turns within one run, beside limits of the machine measured in the same run."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks.figures import median
from kernels.native import library


def alternate(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, run by turns; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            if turn:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: median(values) for name, values in times.items()}


@contextmanager
def reference_kernels() -> Iterator[None]:
    """The torch reference runs within the ``with`` block, and sees weights and caches made within such a block."""
    with mock.patch.object(library, "_load", lambda: (None, "reference (benchmark)")):
        yield


def read(tensors: Sequence[Tensor]) -> None:
    """Touch every byte once."""
    for tensor in tensors:
        tensor.view(torch.int64).sum()
