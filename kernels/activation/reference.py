"""Torch reference of silu_and_mul."""

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See ``kernels.activation.silu_and_mul``."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    # Not F.silu: on CPU its float32 bits differ between a vector's body and its tail, so they would depend on how many
    # rows there are and on how threads share them. torch.exp and the IEEE operations do not.
    return (wide / (1.0 + torch.exp(-wide))).to(gate_up.dtype) * up
