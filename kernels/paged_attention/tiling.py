"""How the reference packs a step's queries into tiles, and which keys each tile reads.

A query tile holds up to ``slots`` consecutive positions of one request, with all query heads of a group: small tiles
for decode rows, large ones for prefill. Matrix products have a multiple of four rows, for which MKL gives a row the
same bits whatever the number of rows and its place among them (tests/executor/test_invariance.py checks it). Tiles are
sorted by position, highest first: key tile j is then read by a prefix of them (views, no copies), of which a shorter
prefix needs no mask.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEY_TILE = 64  # key positions per step of the online softmax
_ROW_MULTIPLE = 4  # (position, query head of a group) rows per query tile are a multiple of this
_LARGE_TILE_ROWS = 64
_SLICE_TILES = 16  # query tiles that are worked on at a time: bounds temporary memory, and keeps it in cache


@dataclass(frozen=True, slots=True)
class KeyTileStep:
    """One key tile of one slice: read by the slice's first ``tiles`` query tiles, masked in the last of them."""

    tiles: int
    granules: Tensor  # int64 [tiles, KEY_TILE / granule]: pieces of blocks that hold the key tile's positions
    unmasked: int  # query tiles whose every row reads every key
    visible: Tensor  # bool [tiles - unmasked, slots, KEY_TILE]
    written: Tensor  # bool [tiles - unmasked, KEY_TILE]: the position holds a key of this request


@dataclass(frozen=True, slots=True)
class TileSlice:
    """Query tiles that are worked on together."""

    tokens: Tensor  # int64 [tiles, slots]: token of the batch; slots that hold none repeat another one
    key_tiles: tuple[KeyTileStep, ...]


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of one step. Shapes are known on the host; tensors live beside the block tables."""

    granule: int  # positions per piece of a block; divides both the block size and KEY_TILE
    slices: tuple[TileSlice, ...]
    token_slots: Tensor  # int64 [tokens]: where each token lies among all slots of all tiles


@dataclass(frozen=True, slots=True)
class _QueryTiles:
    """n query tiles of one size on the host, sorted by position, highest first."""

    request: NDArray[np.int64]  # [n]
    start: NDArray[np.int64]  # [n]: position of slot 0
    end: NDArray[np.int64]  # [n]: position after the tile's last token
    tokens: NDArray[np.int64]  # [n, slots]: token of the batch
    occupied: NDArray[np.bool_]  # [n, slots]: the slot holds a token; others repeat the request's last one


def tile_step(
    query_start_loc: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    block_tables: Tensor,
    block_size: int,
    group_size: int,
) -> Tiling:
    """Tile a step: arguments as of ``plan_attention``."""
    device = block_tables.device
    num_tokens = int(query_start_loc[-1])
    query_lens = np.diff(query_start_loc)
    small = _ROW_MULTIPLE // math.gcd(_ROW_MULTIPLE, group_size)
    large = small * max(1, _LARGE_TILE_ROWS // (small * group_size))
    granule = math.gcd(KEY_TILE, block_size)
    table = _granule_table(block_tables, block_size // granule)

    slices: list[TileSlice] = []
    token_slots = np.empty(num_tokens, np.int64)
    num_slots = 0
    for slots, chosen in ((small, (query_lens > 0) & (query_lens <= small)), (large, query_lens > small)):
        tiles = _pack(np.flatnonzero(chosen), query_start_loc, seq_lens, slots)
        token_slots[tiles.tokens[tiles.occupied]] = num_slots + np.flatnonzero(tiles.occupied)
        num_slots += tiles.tokens.size
        slices.extend(
            _plan_slice(tiles, slice(first, first + _SLICE_TILES), table, KEY_TILE // granule)
            for first in range(0, len(tiles.start), _SLICE_TILES)
        )
    return Tiling(granule, tuple(slices), _to_device(token_slots, device))


def _pack(
    requests: NDArray[np.int64], query_start_loc: NDArray[np.int32], seq_lens: NDArray[np.int32], slots: int
) -> _QueryTiles:
    """Cut the tokens of ``requests`` into tiles of ``slots``."""
    first_token = query_start_loc[requests].astype(np.int64)
    query_lens = query_start_loc[requests + 1] - first_token
    tile_counts = -(-query_lens // slots)
    owner = np.repeat(np.arange(len(requests)), tile_counts)
    offset = (np.arange(len(owner)) - (np.cumsum(tile_counts) - tile_counts)[owner]) * slots  # within the request
    start = seq_lens[requests][owner] - query_lens[owner] + offset
    order = np.argsort(-start, kind="stable")
    owner, offset, start = owner[order], offset[order], start[order]

    place = offset[:, None] + np.arange(slots)
    left = query_lens[owner]
    return _QueryTiles(
        request=requests[owner],
        start=start,
        end=start + np.minimum(slots, left - offset),
        tokens=first_token[owner, None] + np.minimum(place, left[:, None] - 1),
        occupied=place < left[:, None],
    )


def _granule_table(block_tables: Tensor, per_block: int) -> Tensor:
    """int64 [R, W * per_block]: block ids turned into ids of the block's pieces."""
    pieces = torch.arange(per_block, device=block_tables.device)
    return (block_tables.long().unsqueeze(-1) * per_block + pieces).flatten(1)


def _plan_slice(tiles: _QueryTiles, span: slice, table: Tensor, granules_per_tile: int) -> TileSlice:
    """Plan the query tiles of ``span``: which of them read which key tile, through which granules, under which mask."""
    device = table.device
    start, end = tiles.start[span], tiles.end[span]
    slots = tiles.tokens.shape[1]
    num_key_tiles = -(-int(end.max()) // KEY_TILE)
    # Columns past the table are masked; any valid id does there.
    missing = num_key_tiles * granules_per_tile - table.shape[1]
    table = torch.nn.functional.pad(table, (0, max(0, missing)))
    granules = table.index_select(0, _to_device(tiles.request[span], device))
    row_positions = start[:, None] + np.arange(slots)

    steps = []
    for key_tile in range(num_key_tiles):
        keys = key_tile * KEY_TILE + np.arange(KEY_TILE)
        reading = int(np.count_nonzero(start + slots > keys[0]))
        unmasked = int(np.count_nonzero(start >= keys[-1]))
        masked = slice(unmasked, reading)
        steps.append(
            KeyTileStep(
                tiles=reading,
                granules=granules[:reading, key_tile * granules_per_tile : (key_tile + 1) * granules_per_tile],
                unmasked=unmasked,
                visible=_to_device(keys <= row_positions[masked, :, None], device),
                written=_to_device(keys < end[masked, None], device),
            )
        )
    return TileSlice(tokens=_to_device(tiles.tokens[span], device), key_tiles=tuple(steps))


def _to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
