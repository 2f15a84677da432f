"""C++ kernel of rotary_append: cpu.cpp."""

import torch
from torch import Tensor

from kernels.native.heads import adjacent_heads
from kernels.native.library import NativeFunction
from kernels.rotary_append.rotation import Rotation

_rotary_append = NativeFunction("baton_rotary_append", "pipipippfpppppiiiiin")


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """See ``kernels.rotary_append.rotary_append``; rotates ``query`` where it lies, if its heads are adjacent, and
    appends as ``kernels.kv_append.native`` does.
    """
    heads, head_dim = query.shape[1:]
    _, block_size, kv_heads, _ = key_cache.shape
    query, key, value = adjacent_heads(query), adjacent_heads(key), adjacent_heads(value)
    _rotary_append(
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        None if rotation.query_norm is None else rotation.query_norm.data_ptr(),
        None if rotation.key_norm is None else rotation.key_norm.data_ptr(),
        rotation.eps,
        rotation.cos.data_ptr(),
        rotation.sin.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        query.shape[0],
        heads,
        block_size,
        kv_heads,
        head_dim,
        torch.get_num_threads(),
    )
    return query
