"""State of running requests as struct of arrays, indexed by row: a decode step touches no Python object per request."""

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.request import Request

Rows = NDArray[np.intp]

MAX_STOP_TOKEN_IDS = 16
NO_ADMISSION = -1
_NO_TOKEN = -1
_TABLE_HASH_PRIME = np.uint32(0x01000193)


def extend_table_hash(table_hash: int, blocks: NDArray[np.int32]) -> int:
    """Rolling 32-bit hash of a block table after appending ``blocks``; an empty table hashes to 0."""
    for block in blocks.tolist():
        table_hash = (table_hash * int(_TABLE_HASH_PRIME) + block + 1) & 0xFFFFFFFF
    return table_hash


class RowTable:
    """Columns over ``max_rows`` rows.

    Columns:
        admission: int64, which admission holds the row (-1 = none); steps in flight are matched by it.
        handle: int64, the request's handle.
        token_log: int32 [max_rows, max_model_len], prompt and output.
        num_tokens: length of the known log.
        num_explicit: tokens known at admission; their ids travel with plans, later ones stay on the executor.
        num_dispatched: KV entries that exist once every dispatched plan has run.
        num_settled: KV entries confirmed by results.
        max_tokens: the log never grows longer.
        min_tokens: a stop id ends the request only after this many tokens of its log.
        priority, arrival: the request's; the order in which rows lose their places is theirs, backwards.
        wants_logprobs: its sampled tokens come with log probabilities.
        block_table: int32 [max_rows, max_blocks]; num_blocks of them are valid.
        num_matched: leading blocks that came from the prefix cache at admission.
        num_published: leading blocks that are in the prefix cache as this row's own; -1 = publishes no more.
        last_step: last step dispatched for the row.
        stop_token_ids: int32 [max_rows, 16], padded with -1.

    Memory for the two-dimensional columns is only touched as far as rows grow.
    """

    def __init__(self, max_rows: int, max_model_len: int, block_size: int) -> None:
        self.max_rows = max_rows
        self.block_size = block_size
        self.admission = np.full(max_rows, NO_ADMISSION, np.int64)
        self.handle = np.zeros(max_rows, np.int64)
        self.token_log = np.zeros((max_rows, max_model_len), np.int32)
        self.num_tokens = np.zeros(max_rows, np.int32)
        self.num_explicit = np.zeros(max_rows, np.int32)
        self.num_dispatched = np.zeros(max_rows, np.int32)
        self.num_settled = np.zeros(max_rows, np.int32)
        self.max_tokens = np.zeros(max_rows, np.int32)
        self.min_tokens = np.zeros(max_rows, np.int32)
        self.priority = np.zeros(max_rows, np.int32)
        self.arrival = np.zeros(max_rows, np.int64)
        self.wants_logprobs = np.zeros(max_rows, np.bool_)
        self.block_table = np.zeros((max_rows, -(-max_model_len // block_size)), np.int32)
        self.num_blocks = np.zeros(max_rows, np.int32)
        self.num_matched = np.zeros(max_rows, np.int32)
        self.num_published = np.zeros(max_rows, np.int32)
        self.table_hash = np.zeros(max_rows, np.uint32)
        self.last_step = np.zeros(max_rows, np.int64)
        self.stop_token_ids = np.full((max_rows, MAX_STOP_TOKEN_IDS), _NO_TOKEN, np.int32)
        self.requests: list[Request | None] = [None] * max_rows
        self.num_logprob_rows = 0
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._stop_width = 1
        self._has_min_tokens = False  # so far
        self._next_admission = 0

    @property
    def num_running(self) -> int:
        return self.max_rows - len(self._free_rows)

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    def free_rows(self) -> list[int]:
        """Rows without a request, for integrity checks."""
        return list(self._free_rows)

    def request(self, row: int) -> Request:
        """The request that holds ``row``."""
        request = self.requests[row]
        if request is None:
            raise LookupError(f"row {row} is free")
        return request

    def occupy(self, request: Request) -> int:
        """Give ``request`` a row and copy its log there; blocks and cursors start empty."""
        row = self._free_rows.pop()
        count = len(request.token_ids)
        sampling = request.sampling
        stops = sampling.stop_token_ids
        self.requests[row] = request
        self.admission[row] = self._next_admission
        self._next_admission += 1
        self.handle[row] = request.handle
        self.token_log[row, :count] = request.token_ids
        self.num_tokens[row] = count
        self.num_explicit[row] = count
        self.num_dispatched[row] = 0
        self.num_settled[row] = 0
        self.max_tokens[row] = request.max_total_tokens
        self.min_tokens[row] = request.min_total_tokens
        self.priority[row] = request.priority
        self.arrival[row] = request.arrival
        self.wants_logprobs[row] = sampling.num_logprobs is not None
        self.num_logprob_rows += sampling.num_logprobs is not None
        self.num_blocks[row] = 0
        self.num_matched[row] = 0
        self.num_published[row] = 0
        self.table_hash[row] = 0
        self.last_step[row] = 0
        self.stop_token_ids[row] = _NO_TOKEN
        self.stop_token_ids[row, : len(stops)] = stops
        self._stop_width = max(self._stop_width, len(stops))
        self._has_min_tokens |= sampling.min_tokens > 0
        request.row = row
        return row

    def vacate(self, row: int) -> Request:
        """Take the row from its request, which gets its log back. The row's blocks must have been released."""
        request = self.request(row)
        request.token_ids = self.token_log[row, : self.num_tokens[row]].copy()
        request.last_step = int(self.last_step[row])
        request.row = -1
        self.num_logprob_rows -= request.sampling.num_logprobs is not None
        self.requests[row] = None
        self.admission[row] = NO_ADMISSION
        self._free_rows.append(row)
        return request

    def blocks(self, row: int) -> NDArray[np.int32]:
        """The row's block table, a view."""
        return self.block_table[row, : self.num_blocks[row]]

    def append_blocks(self, row: int, blocks: NDArray[np.int32]) -> None:
        """Append to one row's table, at admission."""
        first = self.num_blocks[row]
        self.block_table[row, first : first + len(blocks)] = blocks
        self.num_blocks[row] = first + len(blocks)
        self.table_hash[row] = extend_table_hash(int(self.table_hash[row]), blocks)

    def append_block_each(self, rows: Rows, blocks: NDArray[np.int32]) -> None:
        """Append ``blocks[i]`` to the table of ``rows[i]``, all rows distinct."""
        count = self.num_blocks[rows]
        self.block_table[rows, count] = blocks
        self.num_blocks[rows] = count + 1
        self.table_hash[rows] = self.table_hash[rows] * _TABLE_HASH_PRIME + (blocks + 1).astype(np.uint32)

    def append_token_each(
        self, rows: Rows, token_ids: NDArray[np.int32]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Append ``token_ids[i]`` to the log of ``rows[i]``, all rows distinct.

        Returns:
            Per row: the token is a stop id that ends the request; the log has reached its greatest length.
        """
        count = self.num_tokens[rows]
        self.token_log[rows, count] = token_ids
        count += 1
        self.num_tokens[rows] = count
        stops = self.stop_token_ids[rows, : self._stop_width]
        stopped = stops[:, 0] == token_ids if self._stop_width == 1 else (stops == token_ids[:, None]).any(axis=1)
        if self._has_min_tokens:
            stopped &= count > self.min_tokens[rows]
        return stopped, count >= self.max_tokens[rows]
