"""Triton kernel of rotary_append: one program per token and head, of queries, keys or values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rotary.gpu import rotate_head
from kernels.rotary_append import Rotation


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """See ``kernels.rotary_append.rotary_append``."""
    tokens, heads, head_dim = query.shape
    kv_heads, half = key.shape[1], head_dim // 2
    out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
    if tokens:
        _rotary_append[(tokens, heads + 2 * kv_heads)](
            query,
            key,
            value,
            rotation.query_norm,
            rotation.key_norm,
            rotation.cos,
            rotation.sin,
            out,
            key_cache,
            value_cache,
            slot_mapping,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            heads,
            kv_heads,
            half,
            rotation.eps,
            NORM=rotation.query_norm is not None,
            HALF=triton.next_power_of_2(half),
            num_warps=1,
        )
    return out


@triton.jit
def _rotary_append(
    query,
    key,
    value,
    query_norm,
    key_norm,
    cos,
    sin,
    out,
    key_cache,
    value_cache,
    slot_mapping,
    query_token_stride,
    query_head_stride,
    query_stride,
    key_token_stride,
    key_head_stride,
    key_stride,
    value_token_stride,
    value_head_stride,
    value_stride,
    heads,
    kv_heads,
    half,
    eps,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos += token * half
    sin += token * half
    if head < heads:
        source = query + token * query_token_stride + head * query_head_stride
        target = out + (token * heads + head) * 2 * half
        rotate_head(source, query_stride, query_norm, cos, sin, target, half, eps, True, NORM, HALF)
    else:
        slot = tl.load(slot_mapping + token)
        if head < heads + kv_heads:
            head -= heads
            source = key + token * key_token_stride + head * key_head_stride
            target = key_cache + (slot * kv_heads + head) * 2 * half
            rotate_head(source, key_stride, key_norm, cos, sin, target, half, eps, True, NORM, HALF)
        else:
            head -= heads + kv_heads
            source = value + token * value_token_stride + head * value_head_stride
            target = value_cache + (slot * kv_heads + head) * 2 * half
            rotate_head(source, value_stride, key_norm, cos, sin, target, half, eps, False, NORM, HALF)
