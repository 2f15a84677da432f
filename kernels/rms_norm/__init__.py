"""Root mean square layer normalisation (Zhang and Sennrich 2019), alone or with the residual addition before it."""

from torch import Tensor

from kernels.gpu import library as gpu_library
from kernels.native.library import handles
from kernels.rms_norm import native, reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in x's shape and dtype.

    x: [..., D]; weight: [D], x's dtype. Computed in float32 and rounded to x's dtype before the weight is applied, as
    the checkpoints' own code does.
    """
    if handles(x):
        return native.rms_norm(x, weight, eps)
    if gpu_library.handles(x):
        from kernels.rms_norm import gpu

        return gpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(``rms_norm(x + residual)``, ``x + residual``); the sum is rounded to x's dtype first. x, residual: [..., D]."""
    if handles(x):
        return native.add_rms_norm(x, residual, weight, eps)
    if gpu_library.handles(x):
        from kernels.rms_norm import gpu

        return gpu.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)
