"""C++ kernel of kv_append: cpu.cpp."""

import torch
from torch import Tensor

from kernels.native.heads import adjacent_heads
from kernels.native.library import NativeFunction

_kv_append = NativeFunction("baton_kv_append", "pipipppiiiin")


def kv_append(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """See ``kernels.kv_append.kv_append``; the layout inside blocks is kv_layout.h's."""
    _, block_size, kv_heads, head_dim = key_cache.shape
    key, value = adjacent_heads(key), adjacent_heads(value)
    _kv_append(
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        key.shape[0],
        block_size,
        kv_heads,
        head_dim,
        torch.get_num_threads(),
    )
