"""Checks a plan against this executor's own state, and applies it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from executor_service.admission_checks import check_admission
from executor_service.block_tables import BlockTables
from executor_service.row_state import UNSCHEDULED, RowState
from executor_service.step_plan import EXPLICIT, SAMPLE, Admission, FaultCode, Int32s, PlanError, StepPlan


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """Bounds that were reported to the scheduler."""

    max_rows: int
    max_batched_tokens: int
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True, eq=False)
class StepLayout:
    """Where a step's tokens sit, derived from this executor's own tables. R scheduled rows, T tokens, S sampling rows.

    Attributes:
        num_decodes: leading rows whose input token is ``last_token[row]``.
        query_start_loc: int32 [R + 1], first token of each row.
        ends: int32 [R], the row's KV length after the step, which is also the position of the token it samples.
        positions, slot_mapping: int64 [T].
        sampling: intp [S], indices into the scheduled rows.
    """

    num_decodes: int
    query_start_loc: Int32s
    ends: Int32s
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    sampling: NDArray[np.intp]


class PlanApplier:
    """Applies plans to rows and block tables; whatever does not fit them is the scheduler's error, never repaired."""

    def __init__(self, limits: PlanLimits, rows: RowState, tables: BlockTables) -> None:
        self._limits = limits
        self._rows = rows
        self._tables = tables
        self._indices = np.arange(limits.max_rows)
        self._starts = np.arange(limits.max_rows + 1, dtype=np.int32)

    def reset(self) -> None:
        """Forget everything: a new epoch begins."""
        self._rows.clear()
        self._tables.clear()

    def apply(self, plan: StepPlan) -> StepLayout:
        """Apply ``plan``'s deltas and advance its rows' cursors.

        Raises:
            PlanError: the plan contradicts the state; parts of it may have been applied.
        """
        self._release(plan.released_rows)
        self._admit(plan.admissions)
        self._extend(plan.extend_rows, plan.extend_blocks)
        layout = self._lay_out(plan)
        self._check_tokens(plan, layout)
        self._extend_logs(plan, layout)
        self._rows.advance(plan.rows, layout.ends, (plan.flags & SAMPLE) != 0)
        return layout

    def _release(self, rows: Int32s) -> None:
        if rows.size == 0:
            return
        self._require_held(rows, "released")
        self._rows.clear(rows)
        self._tables.clear(rows)

    def _admit(self, admissions: tuple[Admission, ...]) -> None:
        for admission in admissions:
            row = admission.row
            if row >= self._limits.max_rows or self._rows.admitted[row]:
                raise _bad(f"row {row} is admitted but out of range or taken")
            try:
                check_admission(admission, self._limits.vocab_size, self._limits.max_model_len)
            except ValueError as error:
                raise _bad(f"row {row} has {error}") from error
            self._rows.admit(admission)
        if admissions:
            counts = [admission.block_ids.size for admission in admissions]
            rows = np.repeat(np.array([admission.row for admission in admissions], np.int32), counts)
            self._append(rows, np.concatenate([admission.block_ids for admission in admissions]))

    def _extend(self, rows: Int32s, blocks: Int32s) -> None:
        if rows.size != blocks.size:
            raise _bad(f"{rows.size} rows to extend with {blocks.size} blocks")
        if rows.size:
            self._require_held(rows, "extended")
            self._append(rows, blocks)

    def _append(self, rows: Int32s, blocks: Int32s) -> None:
        try:
            self._tables.append(rows, blocks)
        except ValueError as error:
            raise _bad(str(error)) from error

    def _require_held(self, rows: Int32s, verb: str) -> None:
        max_rows, admitted = self._limits.max_rows, self._rows.admitted
        for row in rows.tolist():
            if not 0 <= row < max_rows:
                raise _bad(f"a {verb} row is outside [0, {max_rows})")
            if not admitted[row]:
                raise _bad(f"row {row} is {verb} but holds no request")

    def _lay_out(self, plan: StepPlan) -> StepLayout:
        num_rows = plan.rows.size
        if not num_rows == plan.num_tokens.size == plan.start_positions.size == plan.flags.size:
            raise _bad("columns of the scheduled rows differ in length")
        if plan.table_hashes.size != num_rows:
            raise _bad(f"{plan.table_hashes.size} table hashes for {num_rows} rows")
        usual = self._lay_out_decodes(plan)
        if usual is not None:
            return usual
        num_decodes = 0
        if num_rows:
            self._require_held(plan.rows, "scheduled")
            if num_rows > 1 and np.bincount(plan.rows).max() > 1:
                raise _bad("a row is scheduled twice")
            num_decodes = self._count_decodes(plan)
        ends = self._check_cursors(plan)
        query_start_loc = np.zeros(num_rows + 1, np.int32)
        np.cumsum(plan.num_tokens, out=query_start_loc[1:])
        first = plan.start_positions.astype(np.int64) - query_start_loc[:-1]
        positions = np.arange(query_start_loc[-1], dtype=np.int64) + np.repeat(first, plan.num_tokens)
        slots = self._tables.slots(np.repeat(plan.rows, plan.num_tokens), positions)
        sampling = np.flatnonzero(plan.flags & SAMPLE)
        return StepLayout(num_decodes, query_start_loc, ends, positions, slots, sampling)

    def _lay_out_decodes(self, plan: StepPlan) -> StepLayout | None:
        """The layout of a step of nothing but decodes that all sample, which spares most of the way to others' layouts.

        None: it is another step, or something is wrong with it, and the long way says what.
        """
        rows, starts, limits = plan.rows, plan.start_positions, self._limits
        count = rows.size
        if not 0 < count == plan.slot_mapping.size <= limits.max_batched_tokens:
            return None
        usual = (plan.flags == SAMPLE) & (plan.num_tokens == 1) & (rows.view(np.uint32) < limits.max_rows)
        if np.count_nonzero(usual) < count or len(set(rows.tolist())) < count:
            return None
        ends = starts + 1
        capacity = self._tables.lengths(rows) * self._tables.block_size
        sound = (starts == self._rows.cursor[rows]) & self._rows.has_sampled[rows]
        sound &= ends <= np.minimum(capacity, limits.max_model_len)
        if np.count_nonzero(sound) < count:
            return None
        positions = starts.astype(np.int64)
        slots = self._tables.slots(rows, positions)
        return StepLayout(count, self._starts[: count + 1], ends, positions, slots, self._indices[:count])

    def _count_decodes(self, plan: StepPlan) -> int:
        if (plan.flags & ~np.uint8(SAMPLE | EXPLICIT)).any():
            raise _bad("unknown flags")
        explicit = (plan.flags & EXPLICIT) != 0
        num_decodes = int(explicit.size - np.count_nonzero(explicit))
        if explicit[:num_decodes].any():
            raise _bad("decode rows must come first")
        decodes = plan.rows[:num_decodes]
        if (plan.num_tokens[:num_decodes] != 1).any():
            raise _bad("a row without explicit tokens has more than one token to compute")
        if not self._rows.has_sampled[decodes].all():
            raise _bad("a row without explicit tokens has not sampled its last token")
        return num_decodes

    def _check_cursors(self, plan: StepPlan) -> Int32s:
        """The rows' KV lengths after the step, int32 [R]."""
        limits = self._limits
        counts, starts = plan.num_tokens.astype(np.int64), plan.start_positions.astype(np.int64)
        if (counts < 1).any():
            raise _bad("a scheduled row has no tokens to compute")
        if counts.sum() > limits.max_batched_tokens:
            raise _bad(f"{counts.sum()} tokens in a step, at most {limits.max_batched_tokens} fit")
        cursors = self._rows.cursor[plan.rows]
        moved = (starts != cursors) | (starts < 0)
        if moved.any():
            # a prefix-cache hit covers whole blocks, so that is where an admitted row may begin
            moved &= (cursors != UNSCHEDULED) | (starts < 0) | (starts % self._tables.block_size != 0)
            if moved.any():
                raise _bad(f"row {plan.rows[moved][0]} does not start where it stopped")
        ends = starts + counts
        capacity = self._tables.lengths(plan.rows).astype(np.int64) * self._tables.block_size
        if (ends > np.minimum(capacity, limits.max_model_len)).any():
            raise _bad("a row's tokens reach past its block table or the longest sequence")
        return ends.astype(np.int32)

    def _check_tokens(self, plan: StepPlan, layout: StepLayout) -> None:
        num_tokens = layout.positions.size
        if np.count_nonzero(plan.table_hashes != self._tables.hashes(plan.rows)):
            raise PlanError(FaultCode.MISMATCH, "a block table's hash differs from the scheduler's")
        if plan.slot_mapping.size != num_tokens or np.count_nonzero(plan.slot_mapping != layout.slot_mapping):
            raise PlanError(FaultCode.MISMATCH, "the slot mapping differs from the block tables'")
        token_ids = plan.prefill_token_ids
        if token_ids.size != num_tokens - layout.num_decodes:
            raise _bad(f"{token_ids.size} input tokens for {num_tokens - layout.num_decodes} positions")
        if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < self._limits.vocab_size:
            raise _bad("an input token is outside the vocabulary")

    def _extend_logs(self, plan: StepPlan, layout: StepLayout) -> None:
        """Rows with penalties sample on the whole of their log, and append to it."""
        sampling = self._rows.sampling
        if not sampling.any_special:
            return
        rows, positions = plan.rows[layout.sampling], layout.ends[layout.sampling]
        gaps = sampling.has_penalties[rows] & (positions > sampling.log_len[rows])
        if gaps.any():
            raise _bad(f"row {rows[gaps][0]} samples past the end of its token log")
        sampling.log_len[rows] = np.maximum(sampling.log_len[rows], positions + 1)


def _bad(message: str) -> PlanError:
    return PlanError(FaultCode.BAD_PLAN, message)
