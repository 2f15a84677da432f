"""Linear layers, the language model head, and token embedding out of the head's weight."""

import torch
from torch import Tensor

from kernels.linear import native, reference
from kernels.linear.packed import PackedMatrix
from kernels.native.library import handles

__all__ = ["PackedMatrix", "embedding", "linear", "pack"]


def pack(weight: Tensor) -> Tensor | PackedMatrix:
    """``weight`` [N, K] in the layout that ``linear`` reads fastest here; ``weight`` itself where that is plain."""
    return native.pack(weight) if handles(weight) else weight


def linear(x: Tensor, weight: Tensor | PackedMatrix, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """``x @ weight.T + bias``, [M, N] of dtype ``out_dtype``: x's own (None) or float32.

    x: [M, K], rows at any stride; weight: [N, K], plain or from ``pack``; bias: [N]. Accumulated in float32.
    With a packed weight each output element is one chain over K, and the bias is added last: a row's bits do not depend
    on M or on the number of threads. With a plain one they do, for some M (``token_rounder``).
    """
    if isinstance(weight, PackedMatrix):
        return native.linear(x, weight, bias, out_dtype or x.dtype)
    return reference.linear(x, weight, bias, out_dtype)


def embedding(input_ids: Tensor, weight: Tensor | PackedMatrix) -> Tensor:
    """Rows ``input_ids`` (int64 [T]) of ``weight`` [N, K], plain or packed: [T, K].

    Ids must be in range: 0 to N - 1. A plain weight makes torch check them, a packed one is not checked.
    """
    if isinstance(weight, PackedMatrix):
        return native.embedding(input_ids, weight)
    return reference.embedding(input_ids, weight)
