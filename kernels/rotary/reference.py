"""Torch reference of apply_rotary and norm_rotary."""

import torch
from torch import Tensor

from kernels.rms_norm.reference import rms_norm


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``kernels.rotary.apply_rotary``."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``kernels.rotary.norm_rotary``."""
    return apply_rotary(rms_norm(x, weight, eps), cos, sin)
