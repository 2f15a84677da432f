"""Linear layers, the language model head, and token embedding out of the head's weight."""

import torch
from torch import Tensor

from kernels.gpu import library as gpu_library
from kernels.linear import native, reference
from kernels.linear.invariant import InvariantMatrix
from kernels.linear.packed import PackedMatrix
from kernels.native.library import handles

__all__ = ["InvariantMatrix", "Matrix", "PackedMatrix", "embedding", "linear", "pack"]

Matrix = Tensor | PackedMatrix | InvariantMatrix


def pack(weight: Tensor, exact: bool = False) -> Matrix:
    """``weight`` [N, K] in the layout that ``linear`` reads fastest here; ``weight`` itself where that is plain.

    ``exact`` asks for a product in which no row's bits depend on the other rows, where that is not so anyway.
    """
    if handles(weight):
        return native.pack(weight)
    return InvariantMatrix(weight) if exact and gpu_library.handles(weight) else weight


def linear(x: Tensor, weight: Matrix, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """``x @ weight.T + bias``, [M, N] of dtype ``out_dtype``: x's own (None) or float32.

    x: [M, K], rows at any stride; weight: [N, K], plain or from ``pack``; bias: [N]. Accumulated in float32.
    With a packed or invariant weight each output element is one chain over K, and the bias is added last: a row's bits
    do not depend on M or on the number of threads. With a plain one they do, for some M (``token_rounder``).
    """
    if isinstance(weight, PackedMatrix):
        return native.linear(x, weight, bias, out_dtype or x.dtype)
    if isinstance(weight, InvariantMatrix):
        from kernels.linear import gpu

        return gpu.linear(x, weight.weight, bias, out_dtype or x.dtype)
    return reference.linear(x, weight, bias, out_dtype)


def embedding(input_ids: Tensor, weight: Matrix) -> Tensor:
    """Rows ``input_ids`` (int64 [T]) of ``weight`` [N, K], plain or packed: [T, K].

    Ids must be in range: 0 to N - 1. A plain weight makes torch check them, a packed one is not checked.
    """
    if isinstance(weight, PackedMatrix):
        return native.embedding(input_ids, weight)
    return reference.embedding(input_ids, weight.weight if isinstance(weight, InvariantMatrix) else weight)
