"""Triton kernels of paged_attention, for decodes and (chunked) prefills mixed in any way.

Keys are read in tiles of ``KEY_TILE`` positions by online softmax, and tiles belong to splits of ``SPLIT_KEYS``
positions: each split starts afresh, and results of splits are merged one after another, first to last. Tiles and splits
lie at fixed positions of the request, and what is masked as a whole changes no bit; so there is one reduction tree for
a query, whoever shares its batch and however its prompt was chunked. The splits of a query run in one program after
another (``_attend``), or side by side where few queries would leave the device idle (``_attend_split``, then
``_merge_splits``): the same tree either way. Multiplications and additions are not fused, since the compiler could
choose otherwise in one kernel than in the other.

All query heads of a key-value head are packed into the rows of one tile, ``rows // group`` positions with ``group``
heads each. Programs find their request by bisection, so that nothing about a step's tiles is computed on the host and
captured graphs hold for any step (after the kernel of vLLM's ``triton_unified_attention``). Numbers that change from
step to step are not specialised on: no kernel is compiled while requests wait.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.library import multiprocessors
from kernels.paged_attention.gpu_tiles import find_request, load_queries, scores_of_split
from kernels.paged_attention.plan import AttentionPlan, DeviceLengths
from kernels.paged_attention.tiling import KEY_TILE

SPLIT_KEYS = 256

_DECODE_ROWS = 16  # the least that matrix units take; float32, which has none, takes no more either
_PREFILL_ROWS = 64
_PROGRAMS_PER_SM = 4


@dataclass(frozen=True, slots=True)
class _Launch:
    """What the three kernels share."""

    rows: int  # of a query tile: positions times query heads of a group
    positions: int  # of a query tile
    tiles: int
    kv_heads: int
    dim: int  # head_dim rounded up to a power of two
    max_splits: int


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    *,
    exact: bool = False,
    rows: int | None = None,
    side_by_side: bool | None = None,
) -> Tensor:
    """See ``kernels.paged_attention.paged_attention``.

    exact: use one tile for decode and prefill, since matrix units may add in another order for another tile.
    rows, side_by_side: choose the tile's rows and whether splits run side by side; None decides by the step.
    """
    lengths = plan.on_device
    launch = _launch_of(query, key_cache, plan, lengths, exact, rows)
    if side_by_side is None:
        side_by_side = lengths.max_query_len == 1 and _split_programs(query.device, launch) > 1
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.shape[0] == 0:
        return out
    shared = (
        query,
        key_cache,
        value_cache,
        lengths.query_start_loc,
        lengths.seq_lens,
        plan.block_tables,
        plan.block_tables.stride(0),
        query.stride(0),
        query.stride(1),
        query.stride(2),
        lengths.seq_lens.shape[0],
        scale,
    )
    constants = {
        "HEAD_DIM": query.shape[2],
        "KV_HEADS": launch.kv_heads,
        "GROUP": plan.group_size,
        "BLOCK_SIZE": plan.block_size,
        "POSITIONS": launch.positions,
        "ROWS": launch.rows,
        "DIM": launch.dim,
        "KEYS": KEY_TILE,
        "SPLIT": SPLIT_KEYS,
        "num_warps": 4,
        "num_stages": 2 if query.element_size() > 2 else 3,
        "enable_fp_fusion": False,
    }
    if not side_by_side:
        _attend[(launch.tiles, launch.kv_heads)](*shared, out, query.shape[0], **constants)
        return out
    heads = query.shape[1]
    partial = torch.empty(
        (query.shape[0], heads, launch.max_splits, query.shape[2]), dtype=torch.float32, device=query.device
    )
    # two tensors, since a view into one may lie at an address of another alignment: another variant of the kernel
    maxima, totals = (torch.empty(partial.shape[:3], dtype=torch.float32, device=query.device) for _ in range(2))
    programs = max(1, min(launch.max_splits, _split_programs(query.device, launch)))
    _attend_split[(launch.tiles, launch.kv_heads, programs)](
        *shared, partial, maxima, totals, launch.max_splits, **constants
    )
    _merge_splits[(query.shape[0], heads)](
        partial,
        maxima,
        totals,
        lengths.query_start_loc,
        lengths.seq_lens,
        lengths.seq_lens.shape[0],
        launch.max_splits,
        out,
        HEAD_DIM=query.shape[2],
        DIM=launch.dim,
        SPLIT=SPLIT_KEYS,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return out


def _launch_of(
    query: Tensor, key_cache: Tensor, plan: AttentionPlan, lengths: DeviceLengths, exact: bool, rows: int | None
) -> _Launch:
    if rows is None:
        small = query.element_size() > 2 or not (exact or lengths.max_query_len > 1)
        rows = _DECODE_ROWS if small else _PREFILL_ROWS
    rows = max(rows, _DECODE_ROWS, triton.next_power_of_2(plan.group_size))
    positions = rows // plan.group_size
    return _Launch(
        rows=rows,
        positions=positions,
        # every request may waste a tile; one more, so that whatever padding there is has programs that zero it
        tiles=query.shape[0] // positions + lengths.seq_lens.shape[0] + 1,
        kv_heads=key_cache.shape[2],
        dim=max(16, triton.next_power_of_2(query.shape[2])),
        max_splits=max(1, triton.cdiv(lengths.max_seq_len, SPLIT_KEYS)),
    )


def _split_programs(device: torch.device, launch: _Launch) -> int:
    """Programs per query tile that fill the device."""
    wanted = _PROGRAMS_PER_SM * multiprocessors(device) // (launch.tiles * launch.kv_heads)
    return min(launch.max_splits, wanted)


@triton.jit(do_not_specialize=["table_stride", "requests", "all_tokens"])
def _attend(
    query,
    key_cache,
    value_cache,
    query_start_loc,
    seq_lens,
    block_tables,
    table_stride,
    token_stride,
    head_stride,
    stride,
    requests,
    scale,
    out,
    all_tokens,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    dims = tl.arange(0, DIM)
    request = find_request(query_start_loc, requests, tile, POSITIONS)
    begin = tl.load(query_start_loc + request)
    end = tl.load(query_start_loc + request + 1)
    real_tokens = tl.load(query_start_loc + requests)
    offset = (tile - begin // POSITIONS - request) * POSITIONS
    first_padding = (tile - real_tokens // POSITIONS - requests) * POSITIONS
    if offset < end - begin:
        seq_len = tl.load(seq_lens + request)
        queries, real, tokens, heads = load_queries(
            query,
            begin + offset,
            kv_head,
            token_stride,
            head_stride,
            stride,
            end - begin - offset,
            HEAD_DIM,
            GROUP,
            POSITIONS,
            ROWS,
            DIM,
        )
        first_position = seq_len - (end - begin) + offset
        positions = first_position + tl.arange(0, ROWS) // GROUP
        seen = tl.minimum(seq_len, first_position + POSITIONS)
        table = block_tables + request.to(tl.int64) * table_stride
        maximum = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        values = tl.zeros((ROWS, DIM), tl.float32)
        split = 0
        while split * SPLIT < seen:
            split_maximum, split_total, split_values = scores_of_split(
                queries,
                key_cache,
                value_cache,
                table,
                split,
                positions,
                seq_len,
                kv_head,
                scale,
                HEAD_DIM,
                KV_HEADS,
                BLOCK_SIZE,
                ROWS,
                DIM,
                KEYS,
                SPLIT,
            )
            new_maximum = tl.maximum(maximum, split_maximum)
            old = tl.exp(maximum - new_maximum)
            new = tl.exp(split_maximum - new_maximum)
            total = total * old + split_total * new
            values = values * old[:, None] + split_values * new[:, None]
            maximum = new_maximum
            split += 1
        target = out + ((tokens * KV_HEADS * GROUP + heads) * HEAD_DIM)[:, None] + dims[None, :]
        result = (values / total[:, None]).to(out.dtype.element_ty)
        tl.store(target, result, mask=real[:, None] & (dims < HEAD_DIM)[None, :])
    elif first_padding >= 0:
        rows = tl.arange(0, ROWS)
        tokens = (real_tokens + first_padding + rows // GROUP).to(tl.int64)
        padded = (rows // GROUP < POSITIONS) & (tokens < all_tokens)
        target = out + ((tokens * KV_HEADS * GROUP + kv_head * GROUP + rows % GROUP) * HEAD_DIM)[:, None]
        zeros = tl.zeros((ROWS, DIM), out.dtype.element_ty)
        tl.store(target + dims[None, :], zeros, mask=padded[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["table_stride", "requests", "max_splits"])
def _attend_split(
    query,
    key_cache,
    value_cache,
    query_start_loc,
    seq_lens,
    block_tables,
    table_stride,
    token_stride,
    head_stride,
    stride,
    requests,
    scale,
    partial,
    maxima,
    totals,
    max_splits,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    dims = tl.arange(0, DIM)
    request = find_request(query_start_loc, requests, tile, POSITIONS)
    begin = tl.load(query_start_loc + request)
    end = tl.load(query_start_loc + request + 1)
    offset = (tile - begin // POSITIONS - request) * POSITIONS
    if offset < end - begin:
        seq_len = tl.load(seq_lens + request)
        queries, real, tokens, heads = load_queries(
            query,
            begin + offset,
            kv_head,
            token_stride,
            head_stride,
            stride,
            end - begin - offset,
            HEAD_DIM,
            GROUP,
            POSITIONS,
            ROWS,
            DIM,
        )
        first_position = seq_len - (end - begin) + offset
        positions = first_position + tl.arange(0, ROWS) // GROUP
        seen = tl.minimum(seq_len, first_position + POSITIONS)
        table = block_tables + request.to(tl.int64) * table_stride
        split = tl.program_id(2)
        while split * SPLIT < seen:
            maximum, total, values = scores_of_split(
                queries,
                key_cache,
                value_cache,
                table,
                split,
                positions,
                seq_len,
                kv_head,
                scale,
                HEAD_DIM,
                KV_HEADS,
                BLOCK_SIZE,
                ROWS,
                DIM,
                KEYS,
                SPLIT,
            )
            lines = (tokens * KV_HEADS * GROUP + heads) * max_splits + split
            tl.store(maxima + lines, maximum, mask=real)
            tl.store(totals + lines, total, mask=real)
            target = partial + (lines * HEAD_DIM)[:, None] + dims[None, :]
            tl.store(target, values, mask=real[:, None] & (dims < HEAD_DIM)[None, :])
            split += tl.num_programs(2)


@triton.jit(do_not_specialize=["requests", "max_splits"])
def _merge_splits(
    partial,
    maxima,
    totals,
    query_start_loc,
    seq_lens,
    requests,
    max_splits,
    out,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):
    token = tl.program_id(0)
    dims = tl.arange(0, DIM)
    line = token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    result = tl.zeros((DIM,), tl.float32)
    if token < tl.load(query_start_loc + requests):
        low = 0
        high = requests
        while low < high:  # the last request that begins at this token or before
            middle = (low + high) // 2
            if tl.load(query_start_loc + middle) <= token:
                low = middle + 1
            else:
                high = middle
        position = tl.load(seq_lens + low - 1) - (tl.load(query_start_loc + low) - token)
        maximum = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        split = 0
        while split * SPLIT <= position:
            split_maximum = tl.load(maxima + line * max_splits + split)
            split_total = tl.load(totals + line * max_splits + split)
            split_values = tl.load(
                partial + (line * max_splits + split) * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0
            )
            new_maximum = tl.maximum(maximum, split_maximum)
            old = tl.exp(maximum - new_maximum)
            new = tl.exp(split_maximum - new_maximum)
            total = total * old + split_total * new
            result = result * old + split_values * new
            maximum = new_maximum
            split += 1
        result = result / total
    tl.store(out + line * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
