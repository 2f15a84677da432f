"""Triton kernel of rms_norm and add_rms_norm: one program per row, so a row's sum has one shape."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kernels.rms_norm.rms_norm``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, None, weight, eps, out, None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``kernels.rms_norm.add_rms_norm``."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, eps, out, total)
    return out, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor | None) -> None:
    size = x.shape[-1]
    rows = x.numel() // size
    if rows:
        block = triton.next_power_of_2(size)
        _rms_norm[(rows,)](
            x,
            residual,
            weight,
            out,
            total,
            size,
            eps,
            ADD=residual is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )


@triton.jit
def _rms_norm(x, residual, weight, out, total, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wide = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = wide + tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = added.to(x.dtype.element_ty)
        tl.store(total + start + columns, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normalised = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + columns, (normalised * weights).to(x.dtype.element_ty), mask=inside)
