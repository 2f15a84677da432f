"""Torch reference of rotary_angles."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.rotary_angles.rotary_angles``."""
    angles = positions.to(torch.float32).unsqueeze(1) * inv_freq
    return angles.cos(), angles.sin()
