"""Heads of tokens as views."""

from collections.abc import Sequence

from torch import Tensor

from kernels.native.memory import unobserved


def split_heads(x: Tensor, counts: Sequence[int], head_dim: int) -> Sequence[Tensor]:
    """Adjacent columns of ``x`` [T, sum of counts * head_dim] as so many heads each: [T, count, head_dim]."""
    with unobserved():
        return x.view(x.shape[0], sum(counts), head_dim).split_with_sizes(counts, 1)


def join_heads(x: Tensor) -> Tensor:
    """``x`` [T, heads, head_dim], contiguous, as [T, heads * head_dim]."""
    with unobserved():
        return x.view(x.shape[0], x.shape[1] * x.shape[2])


def adjacent_heads(x: Tensor) -> Tensor:
    """``x`` [T, heads, head_dim] with each token's heads adjacent, tokens at any stride: a copy where they are not."""
    return x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()
