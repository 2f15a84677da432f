"""C++ kernels of linear: cpu.cpp."""

import torch
from torch import Tensor

from kernels.linear.packed import PackedMatrix
from kernels.native.library import NativeFunction

_BLOCK = 64

_linear = NativeFunction("baton_linear", "pipppiiiinn")
_pack = NativeFunction("baton_linear_pack", "pipiin")
_rows = NativeFunction("baton_linear_rows", "pppiin")


def pack(weight: Tensor) -> PackedMatrix:
    """See ``kernels.linear.pack``."""
    rows, columns = weight.shape
    blocks = torch.empty(-(-rows // _BLOCK), -(-columns // 2), _BLOCK, 2, dtype=weight.dtype)
    _pack(weight.data_ptr(), weight.stride(0), blocks.data_ptr(), rows, columns, torch.get_num_threads())
    return PackedMatrix(blocks, rows, columns)


def linear(x: Tensor, weight: PackedMatrix, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.linear.linear``."""
    m = x.shape[0]
    out = torch.empty((m, weight.rows), dtype=out_dtype)
    _linear(
        x.data_ptr(),
        x.stride(0),
        weight.blocks.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        weight.rows,
        m,
        weight.rows,
        weight.columns,
        out_dtype is torch.float32,
        torch.get_num_threads(),
    )
    return out


def embedding(input_ids: Tensor, weight: PackedMatrix) -> Tensor:
    """See ``kernels.linear.embedding``."""
    tokens = input_ids.shape[0]
    out = torch.empty((tokens, weight.columns), dtype=weight.blocks.dtype)
    _rows(
        input_ids.data_ptr(),
        weight.blocks.data_ptr(),
        out.data_ptr(),
        tokens,
        weight.columns,
        torch.get_num_threads(),
    )
    return out
