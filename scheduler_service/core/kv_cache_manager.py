"""Gives KV blocks to rows, shares them through the prefix cache, takes them back."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.block_pool import BlockPool
from scheduler_service.core.prefix_cache import PrefixCache, hash_blocks
from scheduler_service.core.request import Request
from scheduler_service.core.row_table import NO_ADMISSION, Rows, RowTable

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
        if request.bypasses_cache:
            return []
        return self.cache.match(request.block_hashes, (len(request.token_ids) - 1) // self._block_size)

    def num_matching_tokens(self, request: Request) -> int:
        """Tokens of the prefix that could be had from the cache, for routing."""
        if request.bypasses_cache:
            return 0
        self._hash_known_tokens(request)
        limit = (len(request.token_ids) - 1) // self._block_size
        return self.cache.match_length(request.block_hashes, limit) * self._block_size

    def can_admit(self, request: Request, matched: list[int], reserve: int) -> bool:
        """Whether the request's blocks can be had with ``reserve`` allocatable blocks left over."""
        fresh = self.num_blocks_for(len(request.token_ids)) - len(matched)
        return fresh + self.pool.num_unowned(matched) + reserve <= self.pool.num_allocatable

    def num_victims_needed(
        self, request: Request, matched: list[int], victims: list[int], reserve: Callable[[int], int]
    ) -> int | None:
        """How many of the rows ``victims``, in order, must give up their blocks before the request can be admitted.

        ``reserve`` says how many blocks have to be left over when so many rows are gone. None: not even all would do.
        """
        allocatable = self.pool.num_allocatable
        fresh = self.num_blocks_for(len(request.token_ids)) - len(matched)
        if fresh + reserve(len(victims)) > allocatable + int(self._rows.num_blocks[victims].sum()):
            return None  # at once: this may be asked at every step
        references, shared = self.pool.ref_count.copy(), np.array(matched, np.intp)
        for count, row in enumerate([*victims, None]):
            unowned = int(np.count_nonzero(references[shared] == 0))
            if fresh + unowned + reserve(count) <= allocatable:
                return count
            if row is not None:
                blocks = self._rows.blocks(row)
                references[blocks] -= 1
                allocatable += int(np.count_nonzero(references[blocks] == 0))
        return None

    def admit(self, request: Request, row: int, matched: list[int]) -> None:
        """Fill the row's table: matched blocks, then fresh ones for the rest of the known tokens."""
        self.pool.pin(matched)  # before taking: a matched block must not be evicted for this very request
        fresh = self.pool.take(self.num_blocks_for(len(request.token_ids)) - len(matched))
        self._rows.append_blocks(row, np.concatenate([np.array(matched, np.int32), fresh]))
        self._rows.num_matched[row] = self._rows.num_published[row] = len(matched)

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
        self._publish(request, row, int(self._rows.num_dispatched[row]), pending=True)

    def publish_settled(self, row: int) -> None:
        """Publish the generated blocks of a row that is about to be released, as far as tokens and KV are settled.

        Not before: nobody else has a use for them while their request runs, and a decode step is spared the hashing.
        """
        rows = self._rows
        num_settled = int(rows.num_settled[row])
        first = int(rows.num_published[row])
        if first == _PUBLISHES_NO_MORE or num_settled // self._block_size <= first:
            return
        request = rows.request(row)
        self._hash(request, rows.token_log[row, :num_settled])
        self._publish(request, row, num_settled, pending=False)

    def unpublish(self, row: int) -> None:
        """Let nobody hit what a row has published, nor what others have computed on top of it: it may be wrong."""
        rows, is_cached = self._rows, self.pool.is_cached
        fresh = rows.blocks(row)[rows.num_matched[row] :]
        own = fresh[is_cached[fresh]]
        if not len(own):
            return
        self.pool.uncache(self.cache.subtree(int(own[0])))
        publishing = np.flatnonzero((rows.admission != NO_ADMISSION) & (rows.num_published > 0))
        ends = rows.block_table[publishing, rows.num_published[publishing] - 1]
        rows.num_published[publishing[~is_cached[ends]]] = _PUBLISHES_NO_MORE

    def _publish(self, request: Request, row: int, num_tokens: int, *, pending: bool) -> None:
        """Publish a row's full blocks among its first ``num_tokens`` tokens, whose digests are known.

        A row publishes below its own published chain only, and stops for good where another block already has the
        digest: a cached block's parent in the cache is always the parent in its owner's table, which is what makes
        eviction in release order leaf-first.
        """
        first = int(self._rows.num_published[row])
        if first == _PUBLISHES_NO_MORE:
            return
        last = num_tokens // self._block_size
        blocks = self._rows.block_table[row, first:last]
        parent = int(self._rows.block_table[row, first - 1]) if first else None
        count = 0
        for digest, block in zip(request.block_hashes[first:last], blocks.tolist(), strict=True):
            if not self.cache.publish(digest, block, parent, pending=pending):
                break
            parent = block
            count += 1
        self.pool.is_cached[blocks[:count]] = True
        self._rows.num_published[row] = first + count if count == len(blocks) else _PUBLISHES_NO_MORE

    def _hash_known_tokens(self, request: Request) -> None:
        if request.hash_block_size != self._block_size:  # hashed for an executor with blocks of another size
            request.hash_block_size = self._block_size
            request.block_hashes = []
        self._hash(request, request.token_ids)

    def _hash(self, request: Request, token_ids: NDArray[np.int32]) -> None:
        """Add the digests of the full blocks of ``token_ids``, the request's log so far."""
        hashes = request.block_hashes
        hashed = len(hashes) * self._block_size
        if len(token_ids) - hashed >= self._block_size:
            parent = hashes[-1] if hashes else request.salt
            hashes.extend(hash_blocks(parent, token_ids[hashed:], self._block_size))
