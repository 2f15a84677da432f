"""Whether Triton kernels work on a tensor.

They do on CUDA devices where triton is installed; ``BATON_KERNELS=reference`` switches them off. With
``BATON_KERNELS=triton`` they also run on CPU, through Triton's interpreter (``TRITON_INTERPRET=1``): thousands of times
slower, for checks of the kernels themselves. Modules that import triton are imported when a tensor first needs them.
"""

import importlib.util
import os
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

_INTERPRETED_SMS = 4  # stands for a small device, so that the interpreter sees more than one shape of grid


@cache
def available() -> bool:
    """Whether triton can be imported and nobody switched it off."""
    return os.environ.get("BATON_KERNELS") != "reference" and importlib.util.find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter shall run the kernels on CPU. Raises ``RuntimeError`` when it cannot."""
    if os.environ.get("BATON_KERNELS") != "triton":
        return False
    if not available() or os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("BATON_KERNELS=triton on a CPU needs triton and TRITON_INTERPRET=1")
    return True


def handles(x: Tensor) -> bool:
    """Whether Triton kernels work on ``x``."""
    return available() if x.is_cuda else x.is_cpu and interpreted()


def selection() -> str:
    """How the log and fingerprints call these kernels."""
    return f"triton {metadata.version('triton')}{' interpreted' if interpreted() else ''}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel the device runs side by side, at least."""
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
