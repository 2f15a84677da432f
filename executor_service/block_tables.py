"""The executor's copy of every row's block table, with the rolling hash that proves both copies equal."""

import numpy as np
from numpy.typing import NDArray

from executor_service.step_plan import Int32s, UInt32s

HASH_MULTIPLIER = 0x01000193

_UINT32_MAX = 0xFFFFFFFF
# So many blocks, as decodes append in a step, are sooner appended one by one than numpy gets going.
_FEW = 16


class BlockTables:
    """Append-only block tables, ``table[row, i]`` = physical block of the row's tokens ``[i * block_size, ...)``.

    Host memory: a step gathers just the rows and columns it needs, which is one small upload on a device. Entries past
    a row's length hold the dummy block, so a gathered rectangle never contains an id that a kernel could not read.

    The hash is uint32 arithmetic: an empty table hashes to 0, appending block b gives ``h * HASH_MULTIPLIER + b + 1``.
    """

    def __init__(self, max_rows: int, max_blocks_per_row: int, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dummy_block = num_blocks
        self.max_blocks_per_row = max_blocks_per_row
        self._table = np.full((max_rows, max_blocks_per_row), self.dummy_block, np.int32)
        self._lengths: Int32s = np.zeros(max_rows, np.int32)
        self._hashes: UInt32s = np.zeros(max_rows, np.uint32)
        powers = np.full(max_blocks_per_row + 1, HASH_MULTIPLIER, np.uint32)
        powers[0] = 1
        self._powers = np.multiply.accumulate(powers, dtype=np.uint32)

    def lengths(self, rows: Int32s) -> Int32s:
        """Blocks in the tables of ``rows``."""
        return self._lengths[rows]

    def hashes(self, rows: Int32s) -> UInt32s:
        """Rolling hashes of the tables of ``rows``."""
        return self._hashes[rows]

    def clear(self, rows: Int32s | None = None) -> None:
        """Empty the tables of ``rows``; of all rows when None."""
        where = slice(None) if rows is None else rows
        self._table[where] = self.dummy_block
        self._lengths[where] = 0
        self._hashes[where] = 0

    def append(self, rows: Int32s, blocks: Int32s) -> None:
        """Append ``blocks[i]`` to the table of ``rows[i]``, in order; a row may occur several times.

        Raises:
            ValueError: a block id is out of range, or a table would outgrow the longest sequence.
        """
        if rows.size == 0:
            return
        if blocks.min() < 0 or blocks.max() >= self.num_blocks:
            raise ValueError(f"a block id is outside [0, {self.num_blocks})")
        if rows.size <= _FEW:
            self._append_few(rows.tolist(), blocks.tolist())
            return
        order = np.argsort(rows, kind="stable")
        rows, blocks = rows[order], blocks[order]
        starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
        counts = np.diff(np.r_[starts, rows.size])
        grown = rows[starts]
        if (self._lengths[grown] + counts).max() > self.max_blocks_per_row:
            raise ValueError(f"a block table would outgrow {self.max_blocks_per_row} blocks")
        rank = np.arange(rows.size) - np.repeat(starts, counts)
        self._table[rows, self._lengths[rows] + rank] = blocks
        # h * m^k + sum over the k appended blocks of (b_j + 1) * m^(k-1-j): the recurrence, unrolled
        weights = self._powers[np.repeat(counts, counts) - 1 - rank]
        appended = np.add.reduceat((blocks.astype(np.uint32) + np.uint32(1)) * weights, starts, dtype=np.uint32)
        self._hashes[grown] = self._hashes[grown] * self._powers[counts] + appended
        self._lengths[grown] += counts.astype(np.int32)

    def _append_few(self, rows: list[int], blocks: list[int]) -> None:
        table, lengths, hashes = self._table, self._lengths, self._hashes
        for row, block in zip(rows, blocks, strict=True):
            length = int(lengths[row])
            if length == self.max_blocks_per_row:
                raise ValueError(f"a block table would outgrow {length} blocks")
            table[row, length] = block
            hashes[row] = (int(hashes[row]) * HASH_MULTIPLIER + block + 1) & _UINT32_MAX
            lengths[row] = length + 1

    def slots(self, rows: Int32s, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """KV slot of position ``positions[i]`` of row ``rows[i]``; positions must lie inside the tables."""
        blocks = self._table[rows, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def gather(self, rows: Int32s, width: int) -> Int32s:
        """The first ``width`` columns of the tables of ``rows``: int32 [len(rows), width], a copy."""
        return self._table[rows, :width]
