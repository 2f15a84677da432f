"""First steps through the ordinary path, so that no request pays for what kernels set up when they first run, and so
that the memory of the largest step is known.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from executor_service.admission_checks import MAX_TOP_LOGPROBS
from executor_service.block_tables import BlockTables
from executor_service.executor import StepLauncher
from executor_service.plan_applier import PlanLimits
from executor_service.sampling_state import MAX_BIASES
from executor_service.step_plan import EXPLICIT, SAMPLE, Admission, Int32s, RowSampling, StepPlan


def warm_up(launcher: StepLauncher, block_size: int) -> None:
    """Run a prefill and a decode in block 0, and forget them. Raises whatever the model raises."""
    prompt_len = max(1, block_size - 1)
    launcher.launch(_step(np.arange(prompt_len), EXPLICIT, (Admission(0, _int32s([0]), RowSampling()),))).wait()
    if prompt_len < block_size:
        launcher.launch(_step(np.array([prompt_len]), 0, ())).wait()
    launcher.reset()


def everything(limits: PlanLimits) -> RowSampling:
    """All that a row can ask of a sampler, a grammar and its prompt's log probabilities excepted."""
    biased = np.arange(min(MAX_BIASES, limits.vocab_size), dtype=np.int32)
    return RowSampling(
        temperature=1.0,
        top_k=50,
        top_p=0.9,
        min_p=1e-3,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        bias_token_ids=biased,
        bias_values=np.ones(biased.size, np.float32),
        banned_token_ids=_int32s([0]),
        min_tokens=limits.max_model_len,
        stop_token_ids=_int32s([0]),
        num_logprobs=MAX_TOP_LOGPROBS,
        processed_logprobs=True,
    )


@dataclass(frozen=True, slots=True)
class LargestStep:
    """Steps with as many tokens and rows as the limits allow, all of which sample, and one of them at the very end of
    the longest sequence. They differ in what rows ask for, so that all kernels and tables of a sampler are set up.
    """

    limits: PlanLimits
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks that the steps write to."""
        return int(self._block_counts(self._token_counts()).sum())

    def run(self, launcher: StepLauncher) -> None:
        """Run them, and forget them. Raises whatever the model raises."""
        counts = self._token_counts()
        for plan in (
            self._plan(_int32s([1]), RowSampling()),
            self._plan(counts, RowSampling(temperature=1.0, num_logprobs=MAX_TOP_LOGPROBS)),
            self._plan(counts, RowSampling(temperature=1.0, top_k=50, top_p=0.9)),
            self._plan(counts, replace(everything(self.limits), num_prompt_logprobs=MAX_TOP_LOGPROBS)),
            self._plan(counts, everything(self.limits), audited=True),
        ):
            launcher.launch(plan).wait()
            launcher.reset()

    def _token_counts(self) -> Int32s:
        """Tokens of each row: as even as possible, none past the longest sequence."""
        limits = self.limits
        tokens = min(limits.max_batched_tokens, limits.max_rows * limits.max_model_len)
        rows = min(limits.max_rows, tokens)
        counts = np.full(rows, tokens // rows, np.int32)
        counts[: tokens % rows] += 1
        return counts

    def _block_counts(self, counts: Int32s) -> Int32s:
        """Blocks of each row's tokens."""
        blocks: Int32s = -(-counts // np.int32(self.block_size))
        return blocks

    def _plan(self, counts: Int32s, sampling: RowSampling, audited: bool = False) -> StepPlan:
        """All rows begin, the last one as far from the start as it can: its first block stands for all before it."""
        size = np.int32(self.block_size)
        rows = np.arange(counts.size, dtype=np.int32)
        starts = np.zeros_like(counts)
        starts[-1] = (self.limits.max_model_len - counts[-1]) // size * size
        block_ends = np.cumsum(self._block_counts(counts))
        shares = np.split(np.arange(block_ends[-1], dtype=np.int32), block_ends[:-1])
        shares[-1] = np.concatenate([np.repeat(shares[-1][:1], starts[-1] // size), shares[-1]])
        table_sizes = [share.size for share in shares]
        tables = BlockTables(rows.size, max(table_sizes), self.num_blocks, self.block_size)
        tables.append(np.repeat(rows, table_sizes), np.concatenate(shares))
        ends = starts + counts
        positions = np.arange(counts.sum()) + np.repeat(ends - np.cumsum(counts), counts)
        return StepPlan(
            step_id=0,
            released_rows=_int32s([]),
            admissions=tuple(
                Admission(row, share, sampling, prompt_len=end, token_ids=np.zeros(end, np.int32))
                if not audited
                else Admission(row, share, sampling, 1, np.zeros(end, np.int32), audit_from=1)
                for row, (share, end) in enumerate(zip(shares, ends.tolist(), strict=True))
            ),
            extend_rows=_int32s([]),
            extend_blocks=_int32s([]),
            rows=rows,
            num_tokens=counts,
            start_positions=starts,
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
