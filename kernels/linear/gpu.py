"""Triton kernel of linear that is batch-invariant: what the exact mode runs instead of cuBLAS."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUP = 8  # tiles of rows that share a tile of the weight through the L2 cache


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of the output and steps over K of one program; all three are powers of two from 16 on."""

    rows: int
    columns: int
    depth: int


def tile_of(columns: int, itemsize: int) -> Tile:
    """The tile for a weight of ``columns`` outputs. It never depends on the number of rows: matrix units may add in
    another order for another tile. Narrow weights get narrow tiles, so that few rows still keep the device busy.
    """
    depth = 128 // itemsize
    return Tile(64, 32 if columns <= 2048 else 64 if columns <= 8192 else 128, depth)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """See ``kernels.linear.linear``; every output is one sequential chain over K in steps of ``tile.depth``."""
    m, k = x.shape
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return out
    tile = tile or tile_of(n, x.element_size())
    _linear[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
        x,
        weight,
        bias,
        out,
        m,
        n,
        *x.stride(),
        *weight.stride(),
        SIZE=k,
        BIAS=bias is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=_GROUP,
        num_warps=4,
        num_stages=4,
    )
    return out


@triton.jit(do_not_specialize=["m"])
def _linear(
    x,
    weight,
    bias,
    out,
    m,
    n,
    x_row_stride,
    x_stride,
    weight_row_stride,
    weight_stride,
    SIZE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    group = program // (GROUP * column_tiles)
    group_rows = min(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    rows = (group * GROUP + within % group_rows) * ROWS + tl.arange(0, ROWS)
    columns = (within // group_rows) * COLUMNS + tl.arange(0, COLUMNS)
    depths = tl.arange(0, DEPTH)
    x_rows = x + (rows.to(tl.int64) * x_row_stride)[:, None]
    weight_rows = weight + (columns.to(tl.int64) * weight_row_stride)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, DEPTH):
        inside = start + depths < SIZE
        left = tl.load(
            x_rows + ((start + depths) * x_stride)[None, :], mask=(rows < m)[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            weight_rows + ((start + depths) * weight_stride)[:, None],
            mask=inside[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    target = out + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])
