"""What the Triton attention kernels of gpu.py share: their request, a tile of its queries, a split of its keys."""

import triton
import triton.language as tl


@triton.jit
def find_request(query_start_loc, requests, tile, POSITIONS: tl.constexpr):
    """The last request r whose tiles, which begin at ``query_start_loc[r] // POSITIONS + r``, begin at ``tile``
    or before."""
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // POSITIONS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def scores_of_split(
    queries,
    key_cache,
    value_cache,
    block_table,
    split,
    positions,
    seq_len,
    kv_head,
    scale,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(maximum [ROWS], total [ROWS], weighted values [ROWS, DIM]) of one split's keys; maximum -inf: none is seen."""
    dims = tl.arange(0, DIM)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, DIM), tl.float32)
    for tile in range(SPLIT // KEYS):
        keys = split * SPLIT + tile * KEYS + tl.arange(0, KEYS)
        written = keys < seq_len
        block = tl.load(block_table + keys // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
        lines = ((block * BLOCK_SIZE + keys % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        key = tl.load(
            key_cache + lines[None, :] + dims[:, None], mask=written[None, :] & (dims < HEAD_DIM)[:, None], other=0.0
        )
        scores = tl.dot(queries, key, input_precision="ieee") * scale
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp(scores - base[:, None])
        decay = tl.exp(maximum - base)
        total = total * decay + tl.sum(weights, axis=1)
        value = tl.load(
            value_cache + lines[:, None] + dims[None, :], mask=written[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
        )
        added = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        values = values * decay[:, None] + added
        maximum = new_maximum
    return maximum, total, values


@triton.jit
def load_queries(
    query,
    first_token,
    kv_head,
    token_stride,
    head_stride,
    stride,
    count,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """(queries [ROWS, DIM], which rows hold one, their tokens, their heads); ``count`` tokens are the request's."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    place = rows // GROUP
    real = (place < POSITIONS) & (place < count)
    tokens = (first_token + place).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    queries = tl.load(
        query + (tokens * token_stride + heads * head_stride)[:, None] + (dims * stride)[None, :],
        mask=real[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    return queries, real, tokens, heads
