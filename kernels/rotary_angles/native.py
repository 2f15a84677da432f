"""C++ kernel of rotary_angles: cpu.cpp."""

import torch
from torch import Tensor

from kernels.native import memory
from kernels.native.library import NativeFunction

_rotary_angles = NativeFunction("baton_rotary_angles", "ppppiin")


def rotary_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.rotary_angles.rotary_angles``."""
    tokens, size = positions.shape[0], inv_freq.shape[0]
    cos = memory.empty((tokens, size), torch.float32)
    sin = memory.empty((tokens, size), torch.float32)
    _rotary_angles(
        positions.data_ptr(),
        inv_freq.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        size,
        torch.get_num_threads(),
    )
    return cos, sin
