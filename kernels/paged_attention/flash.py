"""Attention through the flash-attn package (Dao 2023), where it is installed: flash-attn 2 or 3 for CUDA.

Its causal mask is aligned to the end of the keys, which is what a chunk of a prompt needs. Version 3 multiplies values
that no request has written by zero instead of leaving them out (its issues 1745 and 2374): a NaN that a failed request
has left in a block may fail the block's next owner. Version 2 and the other backends never use them.
"""

import importlib
import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.paged_attention.plan import AttentionPlan

logger = logging.getLogger(__name__)

_PACKAGES = ("flash_attn_interface", "flash_attn")  # flash-attn 3 calls itself by another name
FLASH_2_BLOCK_MULTIPLE = 256


@cache  # every layer asks
def installed() -> str | None:
    """The package in use, flash-attn 3 before 2; None where there is none that works with this torch."""
    return next(filter(_can_be_imported, _PACKAGES), None)


def _can_be_imported(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except ImportError as error:  # symbols are missing in a build for another torch
        logger.warning("%s is installed but cannot be used: %s", name, error)
        return False
    return True


def risk() -> str | None:
    """Why callers should not get the package in use unless somebody chose it; see above."""
    return "flash-attn 3 reads what failed requests left" if installed() == "flash_attn_interface" else None


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
        return _zero_padding(_flash_3_varlen(query, key_cache, value_cache, plan, scale), plan)
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
    return _zero_padding(out, plan)


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


def _zero_padding(output: Tensor, plan: AttentionPlan) -> Tensor:
    """``output`` with zeros after the last request, where the package writes nothing: the next layer's keys and values
    of padding lie in the dummy block, and NaN must not get there. In a graph, whatever the number of tokens will be.
    """
    if output.shape[0] > plan.num_tokens:
        tokens = torch.arange(output.shape[0], device=output.device)
        output.masked_fill_((tokens >= plan.on_device.query_start_loc[-1]).view(-1, 1, 1), 0.0)
    return output


def _table_argument() -> str:
    return "page_table" if installed() == "flash_attn_interface" else "block_table"
