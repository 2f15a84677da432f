"""Triton kernel of rotary embedding and head norm, and the device function that other kernels fuse."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def norm_rotary(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``kernels.rotary.norm_rotary``; without a weight, ``apply_rotary``."""
    tokens, heads, head_dim = x.shape
    out = torch.empty((tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    if tokens:
        half = head_dim // 2
        _norm_rotary[(tokens, heads)](
            x,
            weight,
            cos,
            sin,
            out,
            *x.stride(),
            half,
            eps,
            NORM=weight is not None,
            HALF=triton.next_power_of_2(half),
            num_warps=1,
        )
    return out


@triton.jit
def rotate_head(source, stride, weight, cos, sin, target, half, eps, rotates, NORM: tl.constexpr, HALF: tl.constexpr):
    """One head from ``source``, elements ``stride`` apart, to adjacent ones at ``target``.

    ``rotates`` False is a copy. Sums have one shape: a head's bits depend on nothing but the head and its angles.
    """
    pairs = tl.arange(0, HALF)
    inside = pairs < half
    first = tl.load(source + pairs * stride, mask=inside, other=0.0)
    second = tl.load(source + (pairs + half) * stride, mask=inside, other=0.0)
    if rotates:
        dtype = first.dtype
        one, two = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(one * one + two * two, axis=0) / (2 * half) + eps)
            one_weight = tl.load(weight + pairs, mask=inside, other=0.0).to(tl.float32)
            two_weight = tl.load(weight + half + pairs, mask=inside, other=0.0).to(tl.float32)
            one = ((one * scale).to(dtype).to(tl.float32) * one_weight).to(dtype).to(tl.float32)
            two = ((two * scale).to(dtype).to(tl.float32) * two_weight).to(dtype).to(tl.float32)
        cosine = tl.load(cos + pairs, mask=inside, other=0.0)
        sine = tl.load(sin + pairs, mask=inside, other=0.0)
        first = (one * cosine - two * sine).to(dtype)
        second = (two * cosine + one * sine).to(dtype)
    tl.store(target + pairs, first, mask=inside)
    tl.store(target + half + pairs, second, mask=inside)


@triton.jit
def _norm_rotary(
    x,
    weight,
    cos,
    sin,
    out,
    token_stride,
    head_stride,
    stride,
    half,
    eps,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    source = x + token * token_stride + head * head_stride
    target = out + (token * tl.num_programs(1) + head) * 2 * half
    rotate_head(source, stride, weight, cos + token * half, sin + token * half, target, half, eps, True, NORM, HALF)
