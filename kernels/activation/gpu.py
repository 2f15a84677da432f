"""Triton kernel of silu_and_mul."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def silu_and_mul(gate_up: Tensor, block: int = _BLOCK) -> Tensor:
    """See ``kernels.activation.silu_and_mul``; ``block`` elements per program change no bit."""
    gate_up = gate_up.contiguous()
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        _silu_and_mul[(tokens, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block)
    return out


@triton.jit
def _silu_and_mul(gate_up, out, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + token * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * size + columns, (silu * up).to(out.dtype.element_ty), mask=inside)
