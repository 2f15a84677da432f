"""Root mean square normalisation."""

import torch
from torch import Tensor, nn

from executor_service.layers.linear import empty_parameter
from kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Normalises the last dimension; with a residual, adds it first and hands the sum on."""

    def __init__(self, size: int, eps: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter((size,), device, dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised ``x + residual``, ``x + residual``); None if there is nothing to add."""
        if x is None:
            return self(residual), residual
        return add_rms_norm(x, residual, self.weight, self.eps)
