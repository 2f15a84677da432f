"""Angles of rotary position embedding: cosines and sines of a step's positions, computed once for all layers."""

import torch
from torch import Tensor

from kernels.native.library import handles_dtype
from kernels.rotary_angles import native, reference

__all__ = ["rotary_angles"]


def rotary_angles(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of ``positions`` (int64 [T]) times ``inv_freq`` (float32 [D]), float32 [T, D] each.

    The product is rounded to float32 first, as in the checkpoints' own code. ``dtype`` is that of the heads to be
    turned: all kernels of a model come from one library.
    """
    if handles_dtype(inv_freq.device, dtype):
        return native.rotary_angles(positions, inv_freq)
    return reference.rotary_angles(positions, inv_freq)
