"""What the scheduler asks of one step and what the executor answers, as plain values with numpy columns."""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
UInt8s = NDArray[np.uint8]
UInt32s = NDArray[np.uint32]

SAMPLE = 1  # the row samples a token
EXPLICIT = 2  # its input tokens come with the plan, not from last_token[row]


def _no_int32s() -> Int32s:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How tokens are drawn: ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 are off, ``seed`` uint64."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """A request takes ``row``. ``block_ids`` int32 is its whole block table."""

    row: int
    block_ids: Int32s
    sampling: RowSampling
    prompt_len: int = 0
    token_ids: Int32s = field(default_factory=_no_int32s)


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
class StepResult:
    """Tokens (int32) of sampling rows in plan order; ``row_status`` uint8: empty, or per token 0 = good, 1 = bad."""

    step_id: int
    token_ids: Int32s
    row_status: UInt8s = field(default_factory=lambda: np.zeros(0, np.uint8))
    timings: StepTimings = StepTimings()


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
