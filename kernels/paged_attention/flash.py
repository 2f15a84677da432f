"""Attention through the flash-attn package (Dao 2023), where it is installed: flash-attn 2 or 3 for CUDA.

Its causal mask is aligned to the end of the keys, which is what a chunk of a prompt needs. Requests without query
tokens, and padding after the last request, are left out; their outputs are whatever the package leaves there.
"""

import importlib
import importlib.util
from functools import cache
from typing import Any

from torch import Tensor

from kernels.paged_attention.plan import AttentionPlan

_PACKAGES = ("flash_attn_interface", "flash_attn")  # flash-attn 3 calls itself by another name
FLASH_2_BLOCK_MULTIPLE = 256


def installed() -> str | None:
    """The package in use, flash-attn 3 before 2; None where there is none."""
    return next((name for name in _PACKAGES if importlib.util.find_spec(name) is not None), None)


def block_multiple() -> int:
    """What the block size must be a multiple of."""
    return FLASH_2_BLOCK_MULTIPLE if installed() == "flash_attn" else 1


@cache
def _package() -> Any:
    name = installed()
    if name is None:
        raise RuntimeError("flash-attn is not installed")
    return importlib.import_module(name)


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """See ``kernels.paged_attention.paged_attention``. A row's bits may depend on its batch: splits follow its size."""
    lengths = plan.on_device
    if lengths.max_query_len == 1:
        # one token per request, so that tokens are requests; padded ones have no keys and come out as zeros
        requests = lengths.seq_lens.shape[0]
        out = _package().flash_attn_with_kvcache(
            query[:requests].unsqueeze(1),
            key_cache,
            value_cache,
            cache_seqlens=lengths.seq_lens,
            **{_table_argument(): plan.block_tables},
            softmax_scale=scale,
            causal=True,
        )
        decoded: Tensor = out.squeeze(1)
        if query.shape[0] == requests:
            return decoded
        padded = query.new_zeros(query.shape)
        padded[:requests] = decoded
        return padded
    if installed() == "flash_attn_interface":
        return _flash_3_varlen(query, key_cache, value_cache, plan, scale)
    out = _package().flash_attn_varlen_func(
        query,
        key_cache,
        value_cache,
        cu_seqlens_q=lengths.query_start_loc,
        cu_seqlens_k=lengths.key_start_loc,
        max_seqlen_q=lengths.max_query_len,
        max_seqlen_k=lengths.max_seq_len,
        softmax_scale=scale,
        causal=True,
        block_table=plan.block_tables,
    )
    mixed: Tensor = out
    return mixed


def _flash_3_varlen(query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """flash-attn 3 takes paged caches with ragged queries in its cache function only."""
    lengths = plan.on_device
    out: Tensor = _package().flash_attn_with_kvcache(
        query,
        key_cache,
        value_cache,
        cache_seqlens=lengths.seq_lens,
        page_table=plan.block_tables,
        cu_seqlens_q=lengths.query_start_loc,
        max_seqlen_q=lengths.max_query_len,
        softmax_scale=scale,
        causal=True,
    )
    return out


def _table_argument() -> str:
    return "page_table" if installed() == "flash_attn_interface" else "block_table"
