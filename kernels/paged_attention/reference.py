"""Torch reference of paged_attention."""

import torch
from torch import Tensor

from kernels.paged_attention.plan import AttentionPlan
from kernels.paged_attention.tiling import KEY_TILE, KeyTileStep, TileSlice


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """See ``kernels.paged_attention.paged_attention``."""
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    tiling = plan.tiling
    if tiling.slices:
        keys, values = _granules(key_cache, tiling.granule), _granules(value_cache, tiling.granule)
        grouped = torch.unflatten(query, 1, (key_cache.shape[2], plan.group_size))
        packed = torch.cat([_attend(grouped, keys, values, part, scale) for part in tiling.slices])
        output[: plan.num_tokens] = packed.index_select(0, tiling.token_slots).to(query.dtype)
    return output


def _granules(cache: Tensor, granule: int) -> Tensor:
    """View [blocks, block_size, kv_heads, head_dim] as [blocks * pieces, granule, kv_heads, head_dim]."""
    return torch.unflatten(cache, 1, (-1, granule)).flatten(0, 1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, part: TileSlice, scale: float) -> Tensor:
    """Attention of one slice of query tiles: float32 [tiles * slots, heads, head_dim].

    query: [T, kv_heads, group, head_dim]; keys, values: caches viewed in granules.
    """
    tiles, slots = part.tokens.shape
    _, kv_heads, group, head_dim = query.shape
    rows = slots * group
    packed = query.index_select(0, part.tokens.flatten()).view(tiles, slots, kv_heads, group, head_dim)
    packed = packed.permute(0, 2, 1, 3, 4).to(torch.float32).reshape(tiles * kv_heads, rows, head_dim) * scale

    maximum = packed.new_full((tiles * kv_heads, rows, 1), -torch.inf)
    total = packed.new_zeros(tiles * kv_heads, rows, 1)
    acc = torch.zeros_like(packed)
    for step in part.key_tiles:
        n = step.tiles * kv_heads
        key_tile = _gather(keys, step.granules)
        scores = torch.bmm(packed[:n], key_tile.transpose(1, 2))
        value_tile = _gather(values, step.granules)
        _mask(scores, value_tile, step, slots, group)
        # A row that sees nothing of this tile keeps its maximum (tile 0 gave it one): it is multiplied by
        # exp(0) = 1 and added 0, which changes no bit.
        new_maximum = torch.maximum(maximum[:n], scores.amax(-1, keepdim=True))
        weights = torch.exp_(scores.sub_(new_maximum))
        decay = torch.exp(maximum[:n] - new_maximum)
        total[:n].mul_(decay).add_(weights.sum(-1, keepdim=True))
        acc[:n].mul_(decay).add_(torch.bmm(weights, value_tile))
        maximum[:n] = new_maximum
    output = (acc / total).view(tiles, kv_heads, slots, group, head_dim)
    return output.transpose(1, 2).reshape(tiles * slots, kv_heads * group, head_dim)


def _gather(cache: Tensor, granules: Tensor) -> Tensor:
    """One key tile for each query tile and head: float32 [tiles * kv_heads, KEY_TILE, head_dim]."""
    tiles, pieces = granules.shape
    _, granule, kv_heads, head_dim = cache.shape
    picked = cache.index_select(0, granules.flatten()).view(tiles, pieces * granule, kv_heads, head_dim)
    wide = torch.empty((tiles, kv_heads, KEY_TILE, head_dim), dtype=torch.float32, device=cache.device)
    return wide.copy_(picked.transpose(1, 2)).flatten(0, 1)


def _mask(scores: Tensor, value_tile: Tensor, step: KeyTileStep, slots: int, group: int) -> None:
    """Hide keys from rows that must not see them, in place.

    Values of unwritten positions become 0: their weight is 0, but what lies there may be NaN.
    """
    if step.unmasked == step.tiles:
        return
    by_tile = scores.view(step.tiles, -1, slots, group, KEY_TILE)[step.unmasked :]
    by_tile.masked_fill_(~step.visible[:, None, :, None, :], -torch.inf)
    values = value_tile.view(step.tiles, -1, KEY_TILE, value_tile.shape[-1])[step.unmasked :]
    values.masked_fill_(~step.written[:, None, :, None], 0.0)
