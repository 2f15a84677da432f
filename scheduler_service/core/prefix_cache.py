"""Which block holds which prefix: a map from chained block digests to block ids.

Digest of a block = SHA-256(digest of the block before it || its token ids as little-endian int64), started from the
tenant's salt. The scheme is Megatron-core's, with the whole digest as the key and a salt as the root.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TOKEN_BYTES = 8


def token_bytes(token_ids: NDArray[np.int32]) -> bytes:
    """Token ids as they are hashed."""
    return token_ids.astype("<i8").tobytes()


def hash_block(parent: bytes, data: bytes) -> bytes:
    """Digest of the block whose ``token_bytes`` are ``data``, after the block with digest ``parent``."""
    return hashlib.sha256(parent + data).digest()


def hash_blocks(parent: bytes, token_ids: NDArray[np.int32], block_size: int) -> list[bytes]:
    """Digests of the full blocks of ``token_ids``, which continue the chain that ends in ``parent``."""
    stride = block_size * TOKEN_BYTES
    data = token_bytes(token_ids)
    digests = []
    for i in range(len(token_ids) // block_size):
        parent = hash_block(parent, data[i * stride : (i + 1) * stride])
        digests.append(parent)
    return digests


class PrefixCache:
    """Published blocks. A digest stays pending until the plan that fills its block has been dispatched."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._pending: set[bytes] = set()
        self._parent_of: dict[int, int] = {}
        self._children_of: dict[int, set[int]] = {}

    def begin_plan(self) -> None:
        """What the previous plan fills can be hit from now on: later plans run later."""
        self._pending.clear()

    def match(self, digests: Sequence[bytes], limit: int) -> list[int] | None:
        """Blocks of the longest published prefix, at most ``limit``; None if it is worth waiting one plan for more."""
        blocks = []
        for digest in digests[:limit]:
            if digest in self._pending:
                return None
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def match_length(self, digests: Sequence[bytes], limit: int) -> int:
        """How many blocks ``match`` would find, pending ones included, in logarithmic time.

        A chain is published from its root and evicted from its leaf, so what is published is always a prefix.
        """
        low, high = 0, min(limit, len(digests))
        while low < high:
            middle = (low + high + 1) // 2
            if digests[middle - 1] in self._block_of:
                low = middle
            else:
                high = middle - 1
        return low

    def publish(self, digest: bytes, block: int, parent: int | None, *, pending: bool) -> bool:
        """Make ``block`` known under ``digest``, below the published block ``parent``; False if another already is."""
        if digest in self._block_of:
            return False
        self._block_of[digest] = block
        self._digest_of[block] = digest
        if parent is not None:
            self._parent_of[block] = parent
            self._children_of.setdefault(parent, set()).add(block)
        if pending:
            self._pending.add(digest)
        return True

    def subtree(self, block: int) -> list[int]:
        """A published block and all that are published below it, children before their parents."""
        found = [block]
        for one in found:  # grows on the way
            found.extend(self._children_of.get(one, ()))
        return found[::-1]

    def forget(self, block: int) -> None:
        """The block, which has no children any more, is evicted."""
        digest = self._digest_of.pop(block)
        del self._block_of[digest]
        self._pending.discard(digest)
        parent = self._parent_of.pop(block, None)
        if parent is not None:
            siblings = self._children_of[parent]
            siblings.remove(block)
            if not siblings:
                del self._children_of[parent]

    def items(self) -> list[tuple[bytes, int]]:
        """Digests and blocks, for integrity checks."""
        return list(self._block_of.items())
