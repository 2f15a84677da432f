"""Gives KV blocks to rows, shares them through the prefix cache, takes them back."""

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.block_pool import BlockPool
from scheduler_service.core.prefix_cache import TOKEN_BYTES, PrefixCache, hash_block, hash_blocks, token_bytes
from scheduler_service.core.request import Request
from scheduler_service.core.row_table import Rows, RowTable

_PUBLISHES_NO_MORE = -1


class KVCacheManager:
    """Dynamic allocation: an admission gets blocks for all tokens it knows, decoding gets one block at a time."""

    def __init__(self, num_blocks: int, rows: RowTable) -> None:
        self.cache = PrefixCache()
        self.pool = BlockPool(num_blocks, self.cache.forget)
        self._rows = rows
        self._block_size = rows.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of ``num_tokens`` tokens."""
        return -(-num_tokens // self._block_size)

    def match(self, request: Request) -> list[int] | None:
        """Cached blocks of the prefix, leaving at least one token to compute; None if waiting one plan pays."""
        self._hash_known_tokens(request)
        return self.cache.match(request.block_hashes, (len(request.token_ids) - 1) // self._block_size)

    def can_admit(self, request: Request, matched: list[int], reserve: int) -> bool:
        """Whether the request's blocks can be had with ``reserve`` allocatable blocks left over."""
        fresh = self.num_blocks_for(len(request.token_ids)) - len(matched)
        return fresh + self.pool.num_unowned(matched) + reserve <= self.pool.num_allocatable

    def admit(self, request: Request, row: int, matched: list[int]) -> None:
        """Fill the row's table: matched blocks, then fresh ones for the rest of the known tokens."""
        self.pool.pin(matched)  # before taking: a matched block must not be evicted for this very request
        fresh = self.pool.take(self.num_blocks_for(len(request.token_ids)) - len(matched))
        self._rows.append_blocks(row, np.concatenate([np.array(matched, np.int32), fresh]))
        self._rows.num_published[row] = len(matched)

    def extend(self, rows: Rows) -> NDArray[np.int32]:
        """One more block for each row; the blocks, in order."""
        blocks = self.pool.take(len(rows))
        self._rows.append_block_each(rows, blocks)
        return blocks

    def release(self, row: int) -> None:
        """Give the row's blocks back; published ones stay cached."""
        self.pool.release(self._rows.blocks(row))

    def publish_dispatched(self, request: Request, row: int) -> None:
        """Publish the blocks of known tokens that the plan being built fills."""
        first = int(self._rows.num_published[row])
        if first == _PUBLISHES_NO_MORE:
            return
        last = int(self._rows.num_dispatched[row]) // self._block_size
        blocks = self._rows.block_table[row, first:last]
        count = 0
        for digest, block in zip(request.block_hashes[first:last], blocks.tolist(), strict=True):
            if not self.cache.publish(digest, block, pending=True):
                break
            count += 1
        self.pool.is_cached[blocks[:count]] = True
        self._rows.num_published[row] = first + count if count == len(blocks) else _PUBLISHES_NO_MORE

    def publish_settled(self, rows: Rows, num_settled: NDArray[np.int32]) -> None:
        """Publish the generated block that each of ``rows`` has just filled; its tokens and KV are settled.

        A row publishes below its own published chain only, and stops for good where another block already has the
        digest: a cached block's parent in the cache is always the parent in its owner's table, which is what makes
        eviction in release order leaf-first.
        """
        table, block_size = self._rows, self._block_size
        index = num_settled // block_size - 1
        fresh = table.num_published[rows] == index
        rows, index = rows[fresh], index[fresh]
        blocks = table.block_table[rows, index]
        token_ids = table.token_log[rows[:, None], index[:, None] * block_size + np.arange(block_size)]
        digests = self._digests(rows.tolist(), index.tolist(), token_ids)
        published = np.array(
            [self.cache.publish(d, b, pending=False) for d, b in zip(digests, blocks.tolist(), strict=True)], np.bool_
        )
        self.pool.is_cached[blocks[published]] = True
        table.num_published[rows] = np.where(published, index + 1, _PUBLISHES_NO_MORE)

    def _digests(self, rows: list[int], index: list[int], token_ids: NDArray[np.int32]) -> list[bytes]:
        """Digest of block ``index[i]`` of each row, whose tokens are ``token_ids[i]``; remembered by the request."""
        stride = self._block_size * TOKEN_BYTES
        data = token_bytes(token_ids)
        digests = []
        offset = 0
        for row, block_index in zip(rows, index, strict=True):
            request = self._rows.request(row)
            hashes = request.block_hashes
            if len(hashes) == block_index:
                parent = hashes[-1] if hashes else request.salt
                hashes.append(hash_block(parent, data[offset : offset + stride]))
            digests.append(hashes[block_index])
            offset += stride
        return digests

    def _hash_known_tokens(self, request: Request) -> None:
        hashes = request.block_hashes
        hashed = len(hashes) * self._block_size
        if len(request.token_ids) - hashed >= self._block_size:
            parent = hashes[-1] if hashes else request.salt
            hashes.extend(hash_blocks(parent, request.token_ids[hashed:], self._block_size))
