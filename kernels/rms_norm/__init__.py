"""Root mean square layer normalisation (Zhang and Sennrich 2019), alone or with the residual addition before it."""

from torch import Tensor

from kernels.rms_norm import reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in x's shape and dtype.

    x: [..., D]; weight: [D]. Computed in float32 and rounded to x's dtype before the weight is applied, as the
    checkpoints' own code does.
    """
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(``rms_norm(x + residual)``, ``x + residual``); the sum is rounded to x's dtype first. x, residual: [..., D]."""
    return reference.add_rms_norm(x, residual, weight, eps)
