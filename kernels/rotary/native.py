"""C++ kernel of rotary embedding and head norm: cpu.cpp."""

import torch
from torch import Tensor

from kernels.native import memory
from kernels.native.heads import adjacent_heads
from kernels.native.library import NativeFunction

_norm_rotary = NativeFunction("baton_norm_rotary", "pipfpppiiin")


def norm_rotary(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``kernels.rotary.norm_rotary``; without a weight, ``apply_rotary``."""
    tokens, heads, head_dim = x.shape
    x = adjacent_heads(x)
    out = memory.empty((tokens, heads, head_dim), x.dtype)
    _norm_rotary(
        x.data_ptr(),
        x.stride(0),
        None if weight is None else weight.data_ptr(),
        eps,
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        tokens,
        heads,
        head_dim,
        torch.get_num_threads(),
    )
    return out
