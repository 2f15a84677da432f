"""How kernels read the heads of tokens."""

from torch import Tensor


def adjacent_heads(x: Tensor) -> Tensor:
    """``x`` [T, heads, head_dim] with each token's heads adjacent, tokens at any stride: a copy where they are not."""
    return x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()
