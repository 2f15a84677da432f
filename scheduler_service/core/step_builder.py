"""Puts a step together: its decodes, then chunks of known tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.inflight import InflightStep
from scheduler_service.core.row_table import Rows, RowTable
from scheduler_service.core.step_plan import EXPLICIT, SAMPLE, Admission, Int32s, StepPlan

_NO_ROWS = np.zeros(0, np.intp)
_EMPTY = np.zeros(0, np.int32)


@dataclass(slots=True)
class TokenBudget:
    """Tokens that a step can still take. At most ``replay`` of them are of rows that compute lost output anew."""

    tokens: int
    replay: int

    def available(self, *, replays: bool) -> int:
        """What one row may take."""
        return min(self.tokens, self.replay) if replays else self.tokens

    def spend(self, count: int, *, replays: bool) -> None:
        """A row has taken ``count`` tokens."""
        self.tokens -= count
        self.replay -= count if replays else 0


class StepBuilder:
    """One step in the making; it moves the rows' cursors as it goes."""

    def __init__(self, step_id: int, table: RowTable) -> None:
        self.step_id = step_id
        self.admissions: list[Admission] = []
        self._table = table
        self._decode_rows: Rows = _NO_ROWS
        self._decode_starts: Int32s = _EMPTY
        self._extend_rows: Int32s = _EMPTY
        self._extend_blocks: Int32s = _EMPTY
        self._rows: list[int] = []
        self._num_tokens: list[int] = []
        self._start_positions: list[int] = []
        self._flags: list[int] = []
        self._token_ids: list[Int32s] = []
        self._slots: list[Int32s] = []

    @property
    def num_decodes(self) -> int:
        return len(self._decode_rows)

    @property
    def is_empty(self) -> bool:
        return not len(self._decode_rows) and not self._rows

    def decode(
        self, rows: Rows, start: Int32s, block_index: Int32s, extend_rows: Rows, extend_blocks: Int32s
    ) -> Int32s:
        """One token for each of ``rows``, all of which sample; where they end. Once per step, and first.

        Args:
            rows: distinct rows; their tables cover the token.
            start: their cursors.
            block_index: the block of each table that takes the token.
            extend_rows: which tables have grown for this step.
            extend_blocks: by which blocks.
        """
        table = self._table
        self._decode_rows, self._decode_starts = rows, start
        self._extend_rows, self._extend_blocks = extend_rows.astype(np.int32), extend_blocks
        self._slots.append(table.block_table[rows, block_index] * table.block_size + start % table.block_size)
        end = start + 1
        table.num_dispatched[rows] = end
        table.last_step[rows] = self.step_id
        return end

    def chunk(self, row: int, most: int) -> int:
        """Up to ``most`` of a row's known tokens; how many. The last chunk samples."""
        table = self._table
        start, known = int(table.num_dispatched[row]), int(table.num_explicit[row])
        end = min(start + most, known)
        positions = np.arange(start, end, dtype=np.int32)
        self._slots.append(
            table.block_table[row, positions // table.block_size] * table.block_size + positions % table.block_size
        )
        self._rows.append(row)
        self._num_tokens.append(end - start)
        self._start_positions.append(start)
        self._flags.append(EXPLICIT | SAMPLE if end == known else EXPLICIT)
        self._token_ids.append(table.token_log[row, start:end].copy())
        table.num_dispatched[row] = end
        table.last_step[row] = self.step_id
        return end - start

    def build(self, released_rows: Int32s, *, after_idle: bool) -> tuple[StepPlan, InflightStep]:
        """The plan, and what has to be known to settle it."""
        decodes, starts = self._decode_rows, self._decode_starts
        rows = _join(decodes.astype(np.int32), self._rows)
        num_tokens = _join(np.ones(len(decodes), np.int32), self._num_tokens)
        start_positions = _join(starts, self._start_positions)
        flags = np.full(len(rows), SAMPLE, np.uint8)
        flags[len(decodes) :] = self._flags
        plan = StepPlan(
            step_id=self.step_id,
            released_rows=released_rows,
            admissions=tuple(self.admissions),
            extend_rows=self._extend_rows,
            extend_blocks=self._extend_blocks,
            rows=rows,
            num_tokens=num_tokens,
            start_positions=start_positions,
            flags=flags,
            prefill_token_ids=np.concatenate(self._token_ids) if self._token_ids else _EMPTY,
            slot_mapping=self._slots[0] if len(self._slots) == 1 else np.concatenate(self._slots),
            table_hashes=self._table.table_hash[rows],
            after_idle=after_idle,
        )
        return plan, self._inflight_step(plan)

    def _inflight_step(self, plan: StepPlan) -> InflightStep:
        rows = plan.rows.astype(np.intp)
        samples = np.flatnonzero(plan.flags & SAMPLE) if self._rows else None
        logprob_samples: NDArray[np.intp] | None = None
        if self._table.num_logprob_rows:
            wants = self._table.wants_logprobs[rows if samples is None else rows[samples]]
            logprob_samples = np.flatnonzero(wants) if wants.any() else None
        return InflightStep(
            step_id=plan.step_id,
            rows=rows,
            admissions=self._table.admission[rows],
            end_positions=plan.start_positions + plan.num_tokens,
            samples=samples,
            logprob_samples=logprob_samples,
            num_tokens=len(plan.slot_mapping),
            after_idle=plan.after_idle,
        )


def _join(decode: Int32s, prefill: list[int]) -> Int32s:
    """A plan column from its decode part and its prefill part."""
    return np.concatenate([decode, np.array(prefill, np.int32)]) if prefill else decode
