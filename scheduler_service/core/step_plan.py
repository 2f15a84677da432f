"""What one step asks of an executor, as columns, and what it answers."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.request import SamplingParams

Int32s = NDArray[np.int32]

SAMPLE = 1  # the row samples a token
EXPLICIT = 2  # its input tokens come with the plan, not from last_token[row]

_EMPTY = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Admission:
    """A request takes a row. ``block_ids`` is its whole table so far."""

    row: int
    block_ids: Int32s
    num_prompt_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Applied in this order: released rows, admissions, extensions, the step itself.

    Attributes:
        rows, num_tokens, start_positions, flags: one entry per scheduled row, decodes first.
        prefill_token_ids: input tokens of the EXPLICIT rows, concatenated in plan order.
        slot_mapping: KV slot (block * block_size + offset) of every token in plan order.
        table_hashes: rolling hash of each scheduled row's block table.
        after_idle: there was nothing to run before this plan.
    """

    step_id: int
    released_rows: Int32s
    admissions: tuple[Admission, ...]
    extend_rows: Int32s
    extend_blocks: Int32s
    rows: Int32s
    num_tokens: Int32s
    start_positions: Int32s
    flags: NDArray[np.uint8]
    prefill_token_ids: Int32s
    slot_mapping: Int32s
    table_hashes: NDArray[np.uint32]
    after_idle: bool


@dataclass(frozen=True, slots=True)
class StepTimings:
    """Microseconds on the executor: plan's wait, device time, device idle for lack of a plan; plans left waiting."""

    queued_us: int = 0
    device_us: int = 0
    starved_us: int = 0
    plans_queued: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled tokens in plan order of the SAMPLE rows; ``row_status`` is empty or one uint8 per token, 0 = good."""

    step_id: int
    token_ids: Int32s
    row_status: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    timings: StepTimings = StepTimings()


class PrefillColumns:
    """Gathers the columns of a plan's prefill rows, which follow its decode rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.num_tokens: list[int] = []
        self.start_positions: list[int] = []
        self.flags: list[int] = []
        self.token_ids: list[Int32s] = []
        self.slots: list[Int32s] = []
        self.admissions: list[Admission] = []

    def add(self, row: int, start: int, token_ids: Int32s, slots: Int32s, *, samples: bool) -> None:
        """One row's chunk: ``token_ids`` at positions from ``start`` go to ``slots``."""
        self.rows.append(row)
        self.num_tokens.append(len(token_ids))
        self.start_positions.append(start)
        self.flags.append(EXPLICIT | SAMPLE if samples else EXPLICIT)
        self.token_ids.append(token_ids)
        self.slots.append(slots)


@dataclass(frozen=True, slots=True)
class DecodeColumns:
    """The decode rows of a plan: one token each, all of them sample."""

    rows: NDArray[np.intp]
    start_positions: Int32s
    slots: Int32s
    extend_rows: Int32s
    extend_blocks: Int32s


def join(decode: Int32s, prefill: list[int]) -> Int32s:
    """A plan column from its decode part and its prefill part."""
    return np.concatenate([decode, np.array(prefill, np.int32)]) if prefill else decode


def concatenate(parts: list[Int32s]) -> Int32s:
    """All ``parts`` in one array; empty when there are none."""
    return np.concatenate(parts) if parts else _EMPTY
