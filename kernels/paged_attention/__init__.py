"""Attention of a step's queries over the paged key-value cache, decode and (chunked) prefill in one call."""

from torch import Tensor

from kernels.gpu import library as gpu_library
from kernels.native.library import handles_cache
from kernels.paged_attention import native, reference
from kernels.paged_attention.plan import AttentionPlan, DeviceLengths, plan_attention
from kernels.paged_attention.tiling import KEY_TILE

__all__ = ["KEY_TILE", "AttentionPlan", "DeviceLengths", "paged_attention", "plan_attention"]


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Causal softmax attention: a token at position p reads the keys at positions 0 to p of its own request.

    query: [T, heads, head_dim], T padded; heads = kv_heads * the plan's group size, query heads of one group adjacent.
    key_cache, value_cache: [blocks, block_size, kv_heads, head_dim], this step's tokens already there by ``kv_append``.
    plan: ``plan_attention`` of the step. scale: factor of the scores, usually head_dim ** -0.5.

    Returns [T, heads, head_dim] in the query's dtype, zeros for padding. Accumulated in float32 by online softmax
    (Milakov and Gimelshein 2018; tiled as in FlashAttention, Dao et al. 2022) over key tiles of ``KEY_TILE`` positions.
    Tiles lie at fixed positions and one that is masked as a whole changes no bit, so a token's output bits depend on
    its own keys and values only: not on other requests, on chunking, on block placement, or on prefill versus decode.
    Memory that no request has written is never used, NaN or not.
    """
    if handles_cache(key_cache):
        return native.paged_attention(query, key_cache, value_cache, plan, scale)
    if gpu_library.handles(key_cache):
        from kernels.paged_attention import gpu

        return gpu.paged_attention(query, key_cache, value_cache, plan, scale)
    return reference.paged_attention(query, key_cache, value_cache, plan, scale)
