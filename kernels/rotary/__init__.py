"""Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face checkpoints."""

from torch import Tensor

from kernels.rotary import reference

__all__ = ["apply_rotary"]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) of each head by its token's angle i.

    x: [T, heads, head_dim], any strides; cos, sin: float32 [T, head_dim / 2]. Returns x's shape and dtype; computed in
    float32 and rounded once.
    """
    return reference.apply_rotary(x, cos, sin)
