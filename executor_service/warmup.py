"""First steps through the ordinary path, so that no request pays for what kernels set up when they first run, and so
that the memory of the largest step is known.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from executor_service.block_tables import BlockTables
from executor_service.executor import StepLauncher
from executor_service.plan_applier import PlanLimits
from executor_service.step_plan import EXPLICIT, SAMPLE, Admission, Int32s, RowSampling, StepPlan


def warm_up(launcher: StepLauncher, block_size: int) -> None:
    """Run a prefill and a decode in block 0, and forget them. Raises whatever the model raises."""
    prompt_len = max(1, block_size - 1)
    launcher.launch(_step(np.arange(prompt_len), EXPLICIT, (Admission(0, _int32s([0]), RowSampling()),))).wait()
    if prompt_len < block_size:
        launcher.launch(_step(np.array([prompt_len]), 0, ())).wait()
    launcher.reset()


@dataclass(frozen=True, slots=True)
class LargestStep:
    """A step with as many tokens and rows as the limits allow, all of which sample with every filter on."""

    limits: PlanLimits
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks that the step writes to."""
        return int(self._block_counts().sum())

    def run(self, launcher: StepLauncher) -> None:
        """Run it, and forget it. Raises whatever the model raises."""
        launcher.launch(self._plan()).wait()
        launcher.reset()

    def _token_counts(self) -> Int32s:
        """Tokens of each row: as even as possible, none past the longest sequence."""
        limits = self.limits
        tokens = min(limits.max_batched_tokens, limits.max_rows * limits.max_model_len)
        rows = min(limits.max_rows, tokens)
        counts = np.full(rows, tokens // rows, np.int32)
        counts[: tokens % rows] += 1
        return counts

    def _block_counts(self) -> Int32s:
        counts: Int32s = -(-self._token_counts() // np.int32(self.block_size))
        return counts

    def _plan(self) -> StepPlan:
        counts, block_counts = self._token_counts(), self._block_counts()
        rows = np.arange(counts.size, dtype=np.int32)
        blocks = np.arange(block_counts.sum(), dtype=np.int32)
        tables = BlockTables(rows.size, int(block_counts.max()), blocks.size, self.block_size)
        tables.append(np.repeat(rows, block_counts), blocks)
        starts = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        sampling = RowSampling(temperature=1.0, top_k=50, top_p=0.9)
        shares = np.split(blocks, np.cumsum(block_counts)[:-1])
        return StepPlan(
            step_id=0,
            released_rows=_int32s([]),
            admissions=tuple(Admission(row, share, sampling) for row, share in enumerate(shares)),
            extend_rows=_int32s([]),
            extend_blocks=_int32s([]),
            rows=rows,
            num_tokens=counts,
            start_positions=np.zeros_like(counts),
            flags=np.full(rows.size, EXPLICIT | SAMPLE, np.uint8),
            prefill_token_ids=np.zeros(positions.size, np.int32),
            slot_mapping=tables.slots(np.repeat(rows, counts), positions).astype(np.int32),
            table_hashes=tables.hashes(rows),
        )


def _step(positions: npt.NDArray[np.int_], flags: int, admissions: tuple[Admission, ...]) -> StepPlan:
    """Row 0 computes token 0 at ``positions``; block 0 makes slots equal positions, and the table's hash 1."""
    none = _int32s([])
    return StepPlan(
        step_id=0,
        released_rows=none,
        admissions=admissions,
        extend_rows=none,
        extend_blocks=none,
        rows=_int32s([0]),
        num_tokens=_int32s([positions.size]),
        start_positions=_int32s([positions[0]]),
        flags=np.array([flags | SAMPLE], np.uint8),
        prefill_token_ids=np.zeros(positions.size if flags else 0, np.int32),
        slot_mapping=positions.astype(np.int32),
        table_hashes=np.array([1], np.uint32),
    )


def _int32s(values: list[int]) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)
