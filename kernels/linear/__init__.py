"""Linear layers, the language model head, and token embedding out of the head's weight."""

from typing import Literal

import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.gpu import library as gpu_library
from kernels.linear import int8, native, reference
from kernels.linear.int8 import Int8Matrix
from kernels.linear.invariant import InvariantMatrix
from kernels.linear.packed import PackedMatrix
from kernels.native.library import handles, handles_dtype, selection

__all__ = [
    "Int8Matrix",
    "InvariantMatrix",
    "Matrix",
    "PackedMatrix",
    "Quantization",
    "QuantizationError",
    "add_linear",
    "check_quantization",
    "embedding",
    "linear",
    "linear_silu_and_mul",
    "pack",
    "split",
]

Matrix = Tensor | PackedMatrix | Int8Matrix | InvariantMatrix
Quantization = Literal["none", "int8"]


class QuantizationError(ValueError):
    """There are no kernels for such weights here; the message says why, in one line."""


def check_quantization(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ``QuantizationError`` where ``pack`` cannot quantise weights of ``dtype`` on ``device`` that way."""
    if quantization == "int8" and not handles_dtype(device, dtype):
        here = selection(torch.empty(0, device=device, dtype=dtype))
        raise QuantizationError(f"int8 needs native kernels, which work on bfloat16 on CPUs; here: {here}")


def pack(weight: Tensor, exact: bool = False, quantization: Quantization = "none", gated: bool = False) -> Matrix:
    """``weight`` [N, K] in the layout that ``linear`` reads fastest here; ``weight`` itself where that is plain.

    ``exact`` asks for a product in which no row's bits depend on the other rows, where that is not so anyway.
    ``quantization`` int8 rounds the weight to int8 times a scale per row of it (``int8_reference.quantize``); it may
    raise ``QuantizationError``, see ``check_quantization``. ``gated`` is for a weight of ``linear_silu_and_mul``: other
    functions may not be able to read the result.
    """
    check_quantization(quantization, weight.device, weight.dtype)
    if quantization == "int8":
        return int8.pack(weight)
    if handles(weight):
        return native.pack(weight, gated)
    return InvariantMatrix(weight) if exact and gpu_library.handles(weight) else weight


def split(weight: Matrix, rows: int) -> tuple[Matrix, Matrix] | None:
    """The first ``rows`` rows of ``weight`` and the others, in the same memory: products with them have the bits of the
    whole one. None where they might not, or where the layout has no such parts.
    """
    return weight.split(rows) if isinstance(weight, PackedMatrix | Int8Matrix) else None


def linear(x: Tensor, weight: Matrix, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """``x @ weight.T + bias``, [M, N] of dtype ``out_dtype``: x's own (None) or float32.

    x: [M, K], rows at any stride; weight: [N, K], plain or from ``pack``; bias: [N]. Accumulated in float32.
    With a packed, int8 or invariant weight each output element is one chain over K, and the bias is added last: a row's
    bits do not depend on M or on the number of threads. With a plain one they do, for some M (``token_rounder``).
    """
    if isinstance(weight, PackedMatrix):
        return native.linear(x, weight, bias, out_dtype or x.dtype)
    if isinstance(weight, Int8Matrix):
        return int8.linear(x, weight, bias, out_dtype or x.dtype)
    if isinstance(weight, InvariantMatrix):
        from kernels.linear import gpu

        return gpu.linear(x, weight.weight, bias, out_dtype or x.dtype)
    return reference.linear(x, weight, bias, out_dtype)


def add_linear(x: Tensor, weight: Matrix, bias: Tensor | None, total: Tensor) -> bool:
    """Add ``linear(x, weight, bias, None)``, rounded first, to ``total`` [M, N] in place, rows at any stride.

    False, and nothing is done, where a product cannot be added as it is written: a norm that adds what it normalises
    (``kernels.rms_norm.add_rms_norm``) is the faster way there. Both have the same bits.
    """
    if isinstance(weight, PackedMatrix):
        native.add_linear(x, weight, bias, total)
        return True
    if isinstance(weight, Int8Matrix):
        int8.add_linear(x, weight, bias, total)
        return True
    return False


def linear_silu_and_mul(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """``silu_and_mul`` of ``linear(x, weight, bias, None)``, with the same bits: [M, N / 2].

    weight: [N, K], rows that gate and then those that they gate, plain or from ``pack`` with ``gated``. With a packed
    one the product itself, twice the size of the result, is never written.
    """
    if isinstance(weight, PackedMatrix) and weight.gated:
        return native.linear_silu_and_mul(x, weight, bias)
    return silu_and_mul(linear(x, weight, bias, None))


def embedding(input_ids: Tensor, weight: Matrix) -> Tensor:
    """Rows ``input_ids`` (int64 [T]) of ``weight`` [N, K], plain, packed or int8: [T, K].

    Ids must be in range, 0 to N - 1: native kernels do not check them.
    """
    if isinstance(weight, PackedMatrix) or (isinstance(weight, Tensor) and handles(weight) and weight.is_contiguous()):
        return native.embedding(input_ids, weight)
    if isinstance(weight, Int8Matrix):
        return int8.embedding(input_ids, weight)
    return reference.embedding(input_ids, weight.weight if isinstance(weight, InvariantMatrix) else weight)
