"""Append: write the keys and values of a step's tokens into the paged cache."""

from torch import Tensor

from kernels.gpu import library as gpu_library
from kernels.kv_append import native, reference
from kernels.native.library import handles_cache

__all__ = ["kv_append"]


def kv_append(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write ``key[t]`` and ``value[t]`` to slot ``slot_mapping[t]`` = block * block_size + offset, in place.

    key, value: [T, kv_heads, head_dim], any strides, the cache's dtype.
    key_cache, value_cache: [blocks, block_size, kv_heads, head_dim], contiguous. Where elements lie inside a block is
    a matter between this and ``paged_attention``: in native kernels another order than the shape says.
    slot_mapping: int64 [T]. Slots are distinct, except that all padding may share slots of the dummy block; which of
    them wins there is not defined.
    """
    if handles_cache(key_cache):
        native.kv_append(key, value, key_cache, value_cache, slot_mapping)
    elif gpu_library.handles(key_cache):
        from kernels.kv_append import gpu

        gpu.kv_append(key, value, key_cache, value_cache, slot_mapping)
    else:
        reference.kv_append(key, value, key_cache, value_cache, slot_mapping)
