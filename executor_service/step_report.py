"""From what a step yielded, on the host, to what its result says."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from executor_service.masks import TokenMasks
from executor_service.step_plan import Float32s, Int32s, LogprobColumns, RowPromptLogprobs, UInt8s

_NO_INT32S = np.zeros(0, np.int32)
_NO_UINT8S = np.zeros(0, np.uint8)


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A row's share of a step's prompt targets: ``count`` positions from ``start_position`` on."""

    row: int
    start_position: int
    count: int
    num_top: int


@dataclass(frozen=True, slots=True, eq=False)
class StepReport:
    """Who asked for what, known when the step is launched.

    Attributes:
        logprob_counts: int32, how many of the most likely ids each row that reports log probabilities wants.
        prompt_parts: rows of the step's prompt targets, in their order.
        audit_rows: int32, the row of each audited token.
        masks: the step's matchers, which take its tokens.
    """

    logprob_counts: Int32s = field(default_factory=lambda: _NO_INT32S)
    prompt_parts: tuple[PromptPart, ...] = ()
    audit_rows: Int32s = field(default_factory=lambda: _NO_INT32S)
    masks: TokenMasks | None = None


NO_REPORT = StepReport()


@dataclass(frozen=True, slots=True, eq=False)
class HostLogprobs:
    """``Logprobs`` on the host."""

    logprobs: Float32s
    ranks: Int32s
    top_ids: Int32s
    top_logprobs: Float32s


@dataclass(frozen=True, slots=True, eq=False)
class HostTokens:
    """``SampledTokens`` on the host; ``token_ids`` int32."""

    token_ids: Int32s
    row_ok: NDArray[np.bool_]
    logprobs: HostLogprobs | None = None
    prompt_logprobs: HostLogprobs | None = None
    audit_matches: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class HostOutput:
    """What a step's result says; see ``StepResult``."""

    token_ids: Int32s
    row_ok: NDArray[np.bool_]
    logprobs: LogprobColumns | None = None
    prompt_logprobs: tuple[RowPromptLogprobs, ...] = ()
    audited_tokens: int = 0
    audit_mismatch_rows: Int32s = field(default_factory=lambda: _NO_INT32S)
    grammar_ended: UInt8s = field(default_factory=lambda: _NO_UINT8S)


def host_output(tokens: HostTokens, report: StepReport) -> HostOutput:
    """The step's output. Once per step, in the order of steps: matchers move on."""
    ended = _NO_UINT8S
    if report.masks is not None:
        ended = report.masks.accept(tokens.token_ids, tokens.row_ok)
        ended = ended if ended.any() else _NO_UINT8S
    mismatches = _NO_INT32S if tokens.audit_matches is None else report.audit_rows[~tokens.audit_matches]
    return HostOutput(
        token_ids=tokens.token_ids,
        row_ok=tokens.row_ok,
        logprobs=None if tokens.logprobs is None else _columns(tokens.logprobs, report.logprob_counts),
        prompt_logprobs=() if tokens.prompt_logprobs is None else _by_row(tokens.prompt_logprobs, report.prompt_parts),
        audited_tokens=report.audit_rows.size,
        audit_mismatch_rows=mismatches,
        grammar_ended=ended,
    )


def _columns(values: HostLogprobs, counts: Int32s) -> LogprobColumns:
    """Of the most likely ids each entry gets as many as it asked for, and no impossible ones."""
    wanted = np.arange(values.top_ids.shape[1]) < counts[:, None]
    wanted &= values.top_logprobs > -np.inf
    return LogprobColumns(
        logprobs=values.logprobs,
        ranks=values.ranks,
        top_counts=wanted.sum(1, dtype=np.int32),
        top_token_ids=values.top_ids[wanted],
        top_logprobs=values.top_logprobs[wanted],
    )


def _by_row(values: HostLogprobs, parts: tuple[PromptPart, ...]) -> tuple[RowPromptLogprobs, ...]:
    rows = []
    begin = 0
    for part in parts:
        own = slice(begin, begin + part.count)
        begin += part.count
        cut = HostLogprobs(values.logprobs[own], values.ranks[own], values.top_ids[own], values.top_logprobs[own])
        columns = _columns(cut, np.full(part.count, part.num_top, np.int32))
        rows.append(RowPromptLogprobs(part.row, part.start_position, columns))
    return tuple(rows)
