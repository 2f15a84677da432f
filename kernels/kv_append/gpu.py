"""Triton kernel of kv_append: keys and values in one launch."""

import triton
import triton.language as tl
from torch import Tensor


def kv_append(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """See ``kernels.kv_append.kv_append``."""
    tokens, kv_heads, head_dim = key.shape
    if tokens:
        _kv_append[(tokens, kv_heads)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            *key.stride(),
            *value.stride(),
            head_dim,
            DIM=triton.next_power_of_2(head_dim),
            num_warps=1,
        )


@triton.jit
def _kv_append(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_token_stride,
    key_head_stride,
    key_stride,
    value_token_stride,
    value_head_stride,
    value_stride,
    head_dim,
    DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # products of sizes pass 2^31 in long caches and large steps
    head = tl.program_id(1)
    dims = tl.arange(0, DIM)
    inside = dims < head_dim
    target = (tl.load(slot_mapping + token) * tl.num_programs(1) + head) * head_dim + dims
    keys = tl.load(key + token * key_token_stride + head * key_head_stride + dims * key_stride, mask=inside)
    tl.store(key_cache + target, keys, mask=inside)
    values = tl.load(value + token * value_token_stride + head * value_head_stride + dims * value_stride, mask=inside)
    tl.store(value_cache + target, values, mask=inside)
