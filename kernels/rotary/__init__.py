"""Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face checkpoints."""

from torch import Tensor

from kernels.gpu import library as gpu_library
from kernels.native.library import handles
from kernels.rotary import native, reference

__all__ = ["apply_rotary", "norm_rotary"]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) of each head by its token's angle i.

    x: [T, heads, head_dim], any strides; cos, sin: float32 [T, head_dim / 2], contiguous. Returns x's
    shape and dtype; computed in float32 and rounded once.
    """
    if handles(x):
        return native.norm_rotary(x, None, 0.0, cos, sin)
    if gpu_library.handles(x):
        from kernels.rotary import gpu

        return gpu.norm_rotary(x, None, 0.0, cos, sin)
    return reference.apply_rotary(x, cos, sin)


def norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rotary`` of heads that are normalised first: ``kernels.rms_norm.rms_norm`` with weight [head_dim]."""
    if handles(x):
        return native.norm_rotary(x, weight, eps, cos, sin)
    if gpu_library.handles(x):
        from kernels.rotary import gpu

        return gpu.norm_rotary(x, weight, eps, cos, sin)
    return reference.norm_rotary(x, weight, eps, cos, sin)
