"""C++ kernel of paged_attention: cpu.cpp."""

import torch
from torch import Tensor

from kernels.native import memory
from kernels.native.heads import adjacent_heads
from kernels.native.library import NativeFunction
from kernels.paged_attention.plan import AttentionPlan

_paged_attention = NativeFunction("baton_paged_attention", "pippppppiiiiiifn")


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """See ``kernels.paged_attention.paged_attention``."""
    tokens, heads, head_dim = query.shape
    query = adjacent_heads(query)
    starts, seq_lens, tables = plan.addresses
    out = memory.empty((tokens, heads, head_dim), query.dtype)
    if tokens > plan.num_tokens:
        out[plan.num_tokens :].zero_()
    _paged_attention(
        query.data_ptr(),
        query.stride(0),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        out.data_ptr(),
        starts,
        seq_lens,
        tables,
        plan.block_tables.shape[1],
        plan.seq_lens.size,
        heads,
        plan.block_size,
        key_cache.shape[2],
        head_dim,
        scale,
        torch.get_num_threads(),
    )
    return out
