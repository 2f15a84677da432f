"""Linear layers whose weights are int8 with a float32 scale per output: C++ kernels in int8.cpp."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.packed import Output
from kernels.native import memory
from kernels.native.library import NativeFunction

_BLOCK = 64

_linear = NativeFunction("baton_int8_linear", "pippppiiiinn")
_pack = NativeFunction("baton_int8_pack", "pippiin")
_rows = NativeFunction("baton_int8_rows", "ppppiin")


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """A matrix [rows, columns] of int8 codes times the scale of their row, padded with zeros; int8.cpp has the layout.

    Codes go from -127 to 127: ``kernels.linear.int8_reference.quantize`` says which.
    """

    blocks: Tensor  # uint8 [ceil(rows / 64), ceil(columns / 2), 128]
    scales: Tensor  # float32 [rows]
    rows: int
    columns: int

    def split(self, rows: int) -> "tuple[Int8Matrix, Int8Matrix] | None":
        """See ``kernels.linear.split``."""
        whole, rest = divmod(rows, _BLOCK)
        if rest:
            return None
        first = Int8Matrix(self.blocks[:whole], self.scales[:rows], rows, self.columns)
        return first, Int8Matrix(self.blocks[whole:], self.scales[rows:], self.rows - rows, self.columns)


def pack(weight: Tensor) -> Int8Matrix:
    """Quantise a bfloat16 ``weight`` [N, K]."""
    rows, columns = weight.shape
    blocks = memory.zeros((-(-rows // _BLOCK), -(-columns // 2), _BLOCK * 2), torch.uint8)
    scales = torch.empty(rows, dtype=torch.float32)
    _pack(
        weight.data_ptr(),
        weight.stride(0),
        blocks.data_ptr(),
        scales.data_ptr(),
        rows,
        columns,
        torch.get_num_threads(),
    )
    return Int8Matrix(blocks, scales, rows, columns)


def linear(x: Tensor, weight: Int8Matrix, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.linear.linear``; x is not quantised. The sum over K is multiplied by the scale, once."""
    out = memory.empty((x.shape[0], weight.rows), out_dtype)
    _multiply(x, weight, bias, out, Output.of(out_dtype))
    return out


def add_linear(x: Tensor, weight: Int8Matrix, bias: Tensor | None, total: Tensor) -> None:
    """See ``kernels.linear.add_linear``."""
    _multiply(x, weight, bias, total, Output.ADDED)


def _multiply(x: Tensor, weight: Int8Matrix, bias: Tensor | None, out: Tensor, output: Output) -> None:
    _linear(
        x.data_ptr(),
        x.stride(0),
        weight.blocks.data_ptr(),
        weight.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        x.shape[0],
        weight.rows,
        weight.columns,
        output,
        torch.get_num_threads(),
    )


def embedding(input_ids: Tensor, weight: Int8Matrix) -> Tensor:
    """See ``kernels.linear.embedding``: codes times scales, rounded to bfloat16."""
    tokens = input_ids.shape[0]
    out = memory.empty((tokens, weight.columns), torch.bfloat16)
    _rows(
        input_ids.data_ptr(),
        weight.blocks.data_ptr(),
        weight.scales.data_ptr(),
        out.data_ptr(),
        tokens,
        weight.columns,
        torch.get_num_threads(),
    )
    return out
