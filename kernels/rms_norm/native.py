"""C++ kernels of rms_norm: cpu.cpp."""

import torch
from torch import Tensor

from kernels.native import memory
from kernels.native.library import NativeFunction

_rms_norm = NativeFunction("baton_rms_norm", "pippfppiin")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kernels.rms_norm.rms_norm``."""
    size = x.shape[-1]
    x = x.contiguous()
    out = memory.empty(x.shape, x.dtype)
    _rms_norm(
        x.data_ptr(),
        size,
        None,
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        None,
        x.numel() // size,
        size,
        torch.get_num_threads(),
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``kernels.rms_norm.add_rms_norm``."""
    size = x.shape[-1]
    x, residual = x.contiguous(), residual.contiguous()
    out, total = memory.empty(x.shape, x.dtype), memory.empty(x.shape, x.dtype)
    _rms_norm(
        x.data_ptr(),
        size,
        residual.data_ptr(),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        total.data_ptr(),
        x.numel() // size,
        size,
        torch.get_num_threads(),
    )
    return out, total
