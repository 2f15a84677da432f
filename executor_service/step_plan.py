"""What the scheduler asks of one step and what the executor answers, as plain values with numpy columns."""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
UInt8s = NDArray[np.uint8]
UInt32s = NDArray[np.uint32]
Float32s = NDArray[np.float32]

SAMPLE = 1  # the row samples a token
EXPLICIT = 2  # its input tokens come with the plan, not from last_token[row]


def _no_int32s() -> Int32s:
    return np.zeros(0, np.int32)


def _no_float32s() -> Float32s:
    return np.zeros(0, np.float32)


def _no_uint8s() -> UInt8s:
    return np.zeros(0, np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class RowSampling:
    """How tokens are drawn, and what is reported of them; the defaults are greedy, and off.

    Attributes:
        temperature: 0 is greedy. top_k: 0 is off. top_p, repetition_penalty: 1 is off. seed: uint64.
        bias_token_ids, bias_values: int32 and float32, equally many; added to the logits of these ids.
        allowed_token_ids: int32, the only ids that may be sampled; empty = all. banned_token_ids: int32.
        min_tokens, stop_token_ids: none of these ids (int32) is sampled before the output has so many tokens.
        grammar: of llguidance; empty = none.
        num_logprobs: report the sampled token's log probability and those of so many most likely ones; None = no.
        processed_logprobs: of the distribution sampled from, not of the model's own.
        num_prompt_logprobs: the same for the prompt's tokens, always of the model's own distribution; None = no.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    bias_token_ids: Int32s = field(default_factory=_no_int32s)
    bias_values: Float32s = field(default_factory=_no_float32s)
    allowed_token_ids: Int32s = field(default_factory=_no_int32s)
    banned_token_ids: Int32s = field(default_factory=_no_int32s)
    min_tokens: int = 0
    stop_token_ids: Int32s = field(default_factory=_no_int32s)
    grammar: str = ""
    num_logprobs: int | None = None
    processed_logprobs: bool = False
    num_prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty is on."""
        return bool(self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty)


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """A request takes ``row``.

    Attributes:
        block_ids: int32, its whole block table.
        prompt_len: tokens before this position are prompt, from it on output.
        token_ids: int32, the whole token log where parameters or an audit need it, else empty.
        audit_from: sample again what precedes the log's tokens from this position on, and compare; 0 = no audit.
    """

    row: int
    block_ids: Int32s
    sampling: RowSampling
    prompt_len: int = 0
    token_ids: Int32s = field(default_factory=_no_int32s)
    audit_from: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step. Applied in this order: released rows, admissions, extensions, the step itself.

    Attributes:
        released_rows: int32.
        extend_rows, extend_blocks: int32; block ``extend_blocks[i]`` is appended to the table of ``extend_rows[i]``.
        rows, num_tokens, start_positions: int32 [R], flags: uint8 [R]; decodes (no EXPLICIT flag) come first.
        prefill_token_ids: int32, input tokens of the EXPLICIT rows in plan order.
        slot_mapping: int32 [T], KV slot of every token in plan order.
        table_hashes: uint32 [R], rolling hash of each scheduled row's block table.
        after_idle: the scheduler had nothing to run before this plan.
    """

    step_id: int
    released_rows: Int32s
    admissions: tuple[Admission, ...]
    extend_rows: Int32s
    extend_blocks: Int32s
    rows: Int32s
    num_tokens: Int32s
    start_positions: Int32s
    flags: UInt8s
    prefill_token_ids: Int32s
    slot_mapping: Int32s
    table_hashes: UInt32s
    after_idle: bool = False


@dataclass(frozen=True, slots=True)
class MalformedPlan:
    """A plan whose frame parsed but whose columns do not: answered with a Fault, since resending would not help."""

    step_id: int
    message: str


@dataclass(frozen=True, slots=True)
class StepTimings:
    """Microseconds: plan's arrival to launch, launch to tokens, device idle for lack of a plan; plans left waiting."""

    queued_us: int = 0
    device_us: int = 0
    starved_us: int = 0
    plans_queued: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class LogprobColumns:
    """Log probabilities of N tokens.

    Attributes:
        logprobs: float32 [N]. ranks: int32 [N], 1 = the most likely; 0 where the logits were not finite.
        top_counts: int32 [N]. top_token_ids, top_logprobs: int32 and float32 [sum of top_counts], best first.
    """

    logprobs: Float32s
    ranks: Int32s
    top_counts: Int32s
    top_token_ids: Int32s
    top_logprobs: Float32s


@dataclass(frozen=True, slots=True, eq=False)
class RowPromptLogprobs:
    """Log probabilities of a row's prompt tokens from ``start_position`` on."""

    row: int
    start_position: int
    logprobs: LogprobColumns


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step yielded; rows are the sampling ones, in plan order.

    Attributes:
        token_ids: int32, one per row.
        row_status: uint8, empty or per row 0 = good, 1 = its logits were not finite or allow no token.
        logprobs: one entry per row that asks for it; None when none does.
        prompt_logprobs: one per row whose prompt log probabilities this step computed.
        audited_tokens: how many were sampled again. audit_mismatch_rows: int32, a row per token the log has otherwise.
        grammar_ended: uint8, empty or per row 1 = its grammar is complete with this token.
    """

    step_id: int
    token_ids: Int32s
    row_status: UInt8s = field(default_factory=_no_uint8s)
    timings: StepTimings = StepTimings()
    logprobs: LogprobColumns | None = None
    prompt_logprobs: tuple[RowPromptLogprobs, ...] = ()
    audited_tokens: int = 0
    audit_mismatch_rows: Int32s = field(default_factory=_no_int32s)
    grammar_ended: UInt8s = field(default_factory=_no_uint8s)


class FaultCode(IntEnum):
    """Why an executor stopped applying plans; the values are the wire's."""

    BAD_PLAN = 1
    GAP = 2
    MISMATCH = 3
    OUT_OF_MEMORY = 4
    DEVICE_ERROR = 5


@dataclass(frozen=True, slots=True)
class Fault:
    """The step that could not be applied, and why."""

    step_id: int
    code: FaultCode
    message: str


class PlanError(Exception):
    """A plan contradicts this executor's state or bounds."""

    def __init__(self, code: FaultCode, message: str) -> None:
        super().__init__(message)
        self.code = code
