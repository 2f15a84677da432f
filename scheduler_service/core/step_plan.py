"""What one step asks of an executor, as columns, and what it answers."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.request import SamplingParams

Int32s = NDArray[np.int32]

SAMPLE = 1  # the row samples a token
EXPLICIT = 2  # its input tokens come with the plan, not from last_token[row]

NO_TOKENS = np.zeros(0, np.int32)
_NO_FLAGS = np.zeros(0, np.uint8)


@dataclass(frozen=True, slots=True)
class Admission:
    """A request takes a row.

    Attributes:
        block_ids: its whole table so far.
        token_ids: its whole log, where the sampling parameters need it or it is audited; else empty.
        audit_from: where a step computes the logits before a token of the log at this position or later, the executor
            samples again and compares; 0 = nowhere.
    """

    row: int
    block_ids: Int32s
    num_prompt_tokens: int
    sampling: SamplingParams
    token_ids: Int32s = field(default_factory=lambda: NO_TOKENS)
    audit_from: int = 0


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
class RowPromptLogprobs:
    """Log probabilities of a row's prompt tokens at the positions from ``start_position`` on."""

    row: int
    start_position: int
    logprobs: LogprobColumns


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has brought.

    Attributes:
        token_ids: sampled tokens in plan order of the SAMPLE rows.
        row_status: empty, or one uint8 per token, 0 = good.
        logprobs: one entry per sampling row that asks for it, in plan order; None when no row does.
        prompt_logprobs: of the prompt tokens that became known.
        audited_tokens: tokens sampled again for audits.
        audit_mismatch_rows: rows whose log has another token there, one entry per token.
        grammar_ended: empty, or one uint8 per token, 1 = the row's grammar is complete with it.
    """

    step_id: int
    token_ids: Int32s
    row_status: NDArray[np.uint8] = field(default_factory=lambda: _NO_FLAGS)
    timings: StepTimings = StepTimings()
    logprobs: LogprobColumns | None = None
    prompt_logprobs: tuple[RowPromptLogprobs, ...] = ()
    audited_tokens: int = 0
    audit_mismatch_rows: Int32s = field(default_factory=lambda: NO_TOKENS)
    grammar_ended: NDArray[np.uint8] = field(default_factory=lambda: _NO_FLAGS)
