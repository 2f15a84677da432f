"""Gives KV blocks to rows, shares them through the prefix cache, takes them back."""

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.block_pool import BlockPool
from scheduler_service.core.prefix_cache import PrefixCache, hash_blocks
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
        published = int(self._rows.num_published[row])
        if published == _PUBLISHES_NO_MORE:
            return
        for index in range(published, int(self._rows.num_dispatched[row]) // self._block_size):
            if not self._publish(row, index, request.block_hashes[index], pending=True):
                return

    def publish_settled(self, rows: Rows, num_settled: NDArray[np.int32]) -> None:
        """Publish the generated block that each of ``rows`` has just filled; its tokens and KV are settled."""
        index = num_settled // self._block_size - 1
        fresh = self._rows.num_published[rows] == index
        rows, index = rows[fresh], index[fresh]
        columns = index[:, None] * self._block_size + np.arange(self._block_size)
        token_ids = self._rows.token_log[rows[:, None], columns]
        for row, block_index, block_tokens in zip(rows.tolist(), index.tolist(), token_ids, strict=True):
            request = self._rows.request(row)
            hashes = request.block_hashes
            if len(hashes) == block_index:
                hashes.extend(hash_blocks(hashes[-1] if hashes else request.salt, block_tokens, self._block_size))
            self._publish(row, block_index, hashes[block_index], pending=False)

    def _publish(self, row: int, index: int, digest: bytes, *, pending: bool) -> bool:
        """Publish one block of a row, always below the row's own published chain.

        When another block already has the digest, the row publishes no more: a cached block's parent in the cache is
        always the parent in its owner's table, which is what makes eviction in release order leaf-first.
        """
        block = int(self._rows.block_table[row, index])
        if not self.cache.publish(digest, block, pending=pending):
            self._rows.num_published[row] = _PUBLISHES_NO_MORE
            return False
        self.pool.is_cached[block] = True
        self._rows.num_published[row] = index + 1
        return True

    def _hash_known_tokens(self, request: Request) -> None:
        hashes = request.block_hashes
        hashed = len(hashes) * self._block_size
        if len(request.token_ids) - hashed >= self._block_size:
            parent = hashes[-1] if hashes else request.salt
            hashes.extend(hash_blocks(parent, request.token_ids[hashed:], self._block_size))
