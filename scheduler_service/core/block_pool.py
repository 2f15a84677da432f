"""Who owns which KV block: reference counts, the free list, and cached blocks in the order of their eviction."""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class BlockPool:
    """Blocks 0..num_blocks-1. A block is free, cached (no owner, but its content can be hit), or used (ref count > 0).

    A released block may be handed out again at once although steps in flight still write to it: executors apply plans
    strictly in order, so those writes happen before the new owner's.

    Released cached blocks are evicted least recently used first, a chain's leaf before its parents. That needs no tree:
    an owner of a cached block owns its whole chain, so a parent is released in the same call as its child, or later.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self.ref_count: NDArray[np.int32] = np.zeros(num_blocks, np.int32)
        self.is_cached: NDArray[np.bool_] = np.zeros(num_blocks, np.bool_)
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    @property
    def num_allocatable(self) -> int:
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_allocatable

    def take(self, count: int) -> NDArray[np.int32]:
        """``count`` blocks with one owner each; evicts cached blocks when the free list is short.

        Raises:
            ValueError: fewer than ``count`` blocks are allocatable; nothing was taken.
        """
        if count > self.num_allocatable:
            raise ValueError(f"{count} blocks asked for, {self.num_allocatable} allocatable")
        while len(self._free) < count:
            block, _ = self._evictable.popitem(last=False)
            self.is_cached[block] = False
            self._on_evict(block)
            self._free.append(block)
        split = len(self._free) - count
        blocks = np.array(self._free[split:][::-1], np.int32)
        del self._free[split:]
        self.ref_count[blocks] = 1
        return blocks

    def pin(self, blocks: list[int]) -> None:
        """One more owner for cached blocks, so that an allocation cannot evict them."""
        for block in blocks:
            if self.ref_count[block] == 0:
                del self._evictable[block]
            self.ref_count[block] += 1

    def num_unowned(self, blocks: list[int]) -> int:
        """How many of ``blocks`` pinning would take from the allocatable ones."""
        return sum(1 for block in blocks if self.ref_count[block] == 0)

    def release(self, blocks: NDArray[np.int32]) -> None:
        """One owner fewer for each of ``blocks``, a request's table in order (each block at most once)."""
        remaining = self.ref_count[blocks] - 1
        self.ref_count[blocks] = remaining
        orphans = blocks[remaining == 0][::-1]
        cached = self.is_cached[orphans]
        self._free.extend(orphans[~cached].tolist())
        self._evictable.update(dict.fromkeys(orphans[cached].tolist()))

    def uncache(self, blocks: list[int]) -> None:
        """Forget the content of cached blocks, children before their parents; owners keep theirs."""
        for block in blocks:
            self.is_cached[block] = False
            self._on_evict(block)
            if self.ref_count[block] == 0:
                del self._evictable[block]
                self._free.append(block)

    def free_blocks(self) -> list[int]:
        """The free list, for integrity checks."""
        return list(self._free)

    def evictable_blocks(self) -> list[int]:
        """Cached blocks without an owner, next to be evicted first."""
        return list(self._evictable)
