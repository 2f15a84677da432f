"""Torch reference of rms_norm."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kernels.rms_norm.rms_norm``."""
    wide = x.float()
    # rsqrt in float32: the bfloat16 kernel gives other bits in a vector's tail than in its body.
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``kernels.rms_norm.add_rms_norm``."""
    total = x + residual
    return rms_norm(total, weight, eps), total
