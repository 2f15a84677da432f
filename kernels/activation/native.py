"""C++ kernel of silu_and_mul: cpu.cpp."""

import torch
from torch import Tensor

from kernels.native import memory
from kernels.native.library import NativeFunction

_silu_and_mul = NativeFunction("baton_silu_and_mul", "pipiin")


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See ``kernels.activation.silu_and_mul``."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up.contiguous()
    out = memory.empty((tokens, size), gate_up.dtype)
    _silu_and_mul(gate_up.data_ptr(), 2 * size, out.data_ptr(), tokens, size, torch.get_num_threads())
    return out
