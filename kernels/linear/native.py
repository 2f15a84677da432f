"""C++ kernels of linear: cpu.cpp."""

import torch
from torch import Tensor

from kernels.linear.packed import Output, PackedMatrix
from kernels.native import memory
from kernels.native.library import NativeFunction

_BLOCK = 64

_linear = NativeFunction("baton_linear", "pipppiiiinn")
_linear_silu_and_mul = NativeFunction("baton_linear_silu_and_mul", "pipppiiiin")
_pack = NativeFunction("baton_linear_pack", "pipiin")
_pack_gated = NativeFunction("baton_linear_pack_gated", "pipiin")
_rows = NativeFunction("baton_linear_rows", "pppiin")
_plain_rows = NativeFunction("baton_plain_rows", "pppiin")


def pack(weight: Tensor, gated: bool) -> PackedMatrix:
    """See ``kernels.linear.pack``."""
    rows, columns = weight.shape
    blocks = memory.zeros((-(-rows // _BLOCK), -(-columns // 2), _BLOCK, 2), weight.dtype)
    if gated:
        function, count = _pack_gated, rows // 2
    else:
        function, count = _pack, rows
    function(weight.data_ptr(), weight.stride(0), blocks.data_ptr(), count, columns, torch.get_num_threads())
    return PackedMatrix(blocks, rows, columns, gated)


def linear(x: Tensor, weight: PackedMatrix, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.linear.linear``."""
    out = memory.empty((x.shape[0], weight.rows), out_dtype)
    _multiply(x, weight, bias, out, Output.of(out_dtype))
    return out


def add_linear(x: Tensor, weight: PackedMatrix, bias: Tensor | None, total: Tensor) -> None:
    """See ``kernels.linear.add_linear``."""
    _multiply(x, weight, bias, total, Output.ADDED)


def _multiply(x: Tensor, weight: PackedMatrix, bias: Tensor | None, out: Tensor, output: Output) -> None:
    if weight.gated:
        raise ValueError("a gated weight is for linear_silu_and_mul")
    _linear(
        x.data_ptr(),
        x.stride(0),
        weight.blocks.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        x.shape[0],
        weight.rows,
        weight.columns,
        output,
        torch.get_num_threads(),
    )


def linear_silu_and_mul(x: Tensor, weight: PackedMatrix, bias: Tensor | None) -> Tensor:
    """See ``kernels.linear.linear_silu_and_mul``; ``weight`` is gated."""
    m, size = x.shape[0], weight.rows // 2
    out = memory.empty((m, size), x.dtype)
    _linear_silu_and_mul(
        x.data_ptr(),
        x.stride(0),
        weight.blocks.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        size,
        m,
        size,
        weight.columns,
        torch.get_num_threads(),
    )
    return out


def embedding(input_ids: Tensor, weight: PackedMatrix | Tensor) -> Tensor:
    """See ``kernels.linear.embedding``; a plain weight is contiguous."""
    if isinstance(weight, PackedMatrix):
        function, rows, size = _rows, weight.blocks, weight.columns
    else:
        function, rows, size = _plain_rows, weight, weight.shape[1]
    tokens = input_ids.shape[0]
    out = memory.empty((tokens, size), rows.dtype)
    function(input_ids.data_ptr(), rows.data_ptr(), out.data_ptr(), tokens, size, torch.get_num_threads())
    return out
