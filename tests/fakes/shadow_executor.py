"""An executor without a model: checks every plan against its own memory and answers hashes of histories."""

from dataclasses import dataclass, field

import numpy as np

from scheduler_service.core.row_table import extend_table_hash
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import EXPLICIT, SAMPLE, StepPlan, StepResult, StepTimings

_MASK = (1 << 64) - 1
ROOT = 0x9E3779B97F4A7C15


def mix(history: int, token_id: int) -> int:
    """History after one more token."""
    x = (history ^ (token_id + 0x632BE59BD9B4E019)) * 0xBF58476D1CE4E5B9 & _MASK
    return (x ^ (x >> 29)) * 0x94D049BB133111EB & _MASK


def next_token(history: int, seed: int, vocab_size: int) -> int:
    """The token that follows a history."""
    return (mix(history, seed) >> 33) % vocab_size


def oracle(
    prompt: list[int], max_tokens: int, seed: int, stop_token_ids: tuple[int, ...], vocab_size: int
) -> list[int]:
    """What a request must answer, computed alone and step by step."""
    history = ROOT
    for token_id in prompt:
        history = mix(history, token_id)
    output: list[int] = []
    while len(output) < max_tokens:
        output.append(next_token(history, seed, vocab_size))
        if output[-1] in stop_token_ids:
            break
        history = mix(history, output[-1])
    return output


class PlanError(AssertionError):
    """A plan would have corrupted a real executor."""


@dataclass
class _Row:
    table: list[int]
    seed: int
    computed: int | None = None  # None until its first step says where the cached prefix ends
    histories: list[int] = field(default_factory=list)  # of this admission's own positions
    first: int = 0
    last_token: int | None = None


class ShadowExecutor:
    """Applies plans strictly in order. Its KV memory maps a slot to the history of the token written there."""

    def __init__(self, capacity: ExecutorCapacity) -> None:
        self.capacity = capacity
        self.step_id = 0
        self.rows: dict[int, _Row] = {}
        self.memory: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step.

        Raises:
            PlanError: the plan breaks a rule of execution.proto, or reads KV that is not the row's own history.
        """
        self._require(plan.step_id == self.step_id + 1, f"step {plan.step_id} after {self.step_id}")
        self.step_id = plan.step_id
        for row in plan.released_rows.tolist():
            self._require(row in self.rows, f"row {row} released twice")
            del self.rows[row]
        for admission in plan.admissions:
            self._require(admission.row not in self.rows, f"row {admission.row} admitted twice")
            self._require(0 <= admission.row < self.capacity.max_rows, "row out of range")
            self.rows[admission.row] = _Row(admission.block_ids.tolist(), admission.sampling.seed)
        for row, block in zip(plan.extend_rows.tolist(), plan.extend_blocks.tolist(), strict=True):
            self.rows[row].table.append(block)
        self._check_batch(plan)
        return StepResult(plan.step_id, np.array(self._forward(plan), np.int32), timings=StepTimings())

    def _check_batch(self, plan: StepPlan) -> None:
        capacity = self.capacity
        self._require(0 < plan.num_tokens.sum() <= capacity.max_batched_tokens, "token budget")
        self._require(len(plan.slot_mapping) == plan.num_tokens.sum(), "slot mapping's length")
        self._require(len(set(plan.rows.tolist())) == len(plan.rows), "a row is scheduled twice")
        self._require(len(set(plan.slot_mapping.tolist())) == len(plan.slot_mapping), "a slot is written twice")
        is_prefill = (plan.flags & EXPLICIT) != 0
        self._require((np.diff(is_prefill.astype(int)) >= 0).all(), "decodes come first")
        self._require(len(plan.prefill_token_ids) == plan.num_tokens[is_prefill].sum(), "prefill tokens' length")
        for row, table_hash in zip(plan.rows.tolist(), plan.table_hashes.tolist(), strict=True):
            table = np.array(self.rows[row].table, np.int32)
            self._require(((table >= 0) & (table < capacity.num_blocks)).all(), "block out of range")
            self._require(extend_table_hash(0, table) == table_hash, f"row {row}: table hash")

    def _forward(self, plan: StepPlan) -> list[int]:
        """All rows write their KV first, then every row reads all it may attend to, as a kernel would."""
        tokens = iter(plan.prefill_token_ids.tolist())
        slots = iter(plan.slot_mapping.tolist())
        columns = list(
            zip(
                plan.rows.tolist(),
                plan.num_tokens.tolist(),
                plan.start_positions.tolist(),
                plan.flags.tolist(),
                strict=True,
            )
        )
        for number, count, start, flags in columns:
            row = self.rows[number]
            self._begin(row, number, start)
            for position in range(start, start + count):
                token = next(tokens) if flags & EXPLICIT else row.last_token
                self._require(token is not None, f"row {number}: no last token yet")
                slot = next(slots)
                self._require(slot == self._slot(row, position), f"row {number}: slot of position {position}")
                previous = self.memory[self._slot(row, position - 1)] if position else ROOT
                self.memory[slot] = mix(previous, token)
                row.histories.append(self.memory[slot])
            row.computed = start + count
        sampled = []
        for number, _, _, flags in columns:
            row = self.rows[number]
            self._check_own_history(row, number)
            if flags & SAMPLE:
                row.last_token = next_token(row.histories[-1], row.seed, self.capacity.vocab_size)
                sampled.append(row.last_token)
        return sampled

    def _begin(self, row: _Row, number: int, start: int) -> None:
        if row.computed is None:
            self._require(start % self.capacity.block_size == 0, f"row {number}: unaligned prefix hit")
            row.computed = row.first = start
        self._require(start == row.computed, f"row {number}: starts at {start}, has {row.computed}")

    def _check_own_history(self, row: _Row, number: int) -> None:
        for offset, history in enumerate(row.histories):
            held = self.memory[self._slot(row, row.first + offset)]
            self._require(held == history, f"row {number}: position {row.first + offset} was overwritten")

    def _slot(self, row: _Row, position: int) -> int:
        block_size = self.capacity.block_size
        self._require(position < len(row.table) * block_size, "position beyond the block table")
        return row.table[position // block_size] * block_size + position % block_size

    @staticmethod
    def _require(condition: object, message: str) -> None:
        if not condition:
            raise PlanError(message)
