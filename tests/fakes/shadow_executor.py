"""An executor without a model: checks every plan against its own memory and answers hashes of histories."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.request import SamplingParams
from scheduler_service.core.row_table import extend_table_hash
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import (
    EXPLICIT,
    SAMPLE,
    Admission,
    RowPromptLogprobs,
    StepPlan,
    StepResult,
    StepTimings,
)

_MASK = (1 << 64) - 1
ROOT = 0x9E3779B97F4A7C15

# What ``SamplingParams.encoded`` may say to a shadow executor.
GRAMMAR = b"grammar"  # every token that is a multiple of 5 completes it
POISON = b"poison"  # the executor dies computing the third token


def mix(history: int, token_id: int) -> int:
    """History after one more token."""
    x = (history ^ (token_id + 0x632BE59BD9B4E019)) * 0xBF58476D1CE4E5B9 & _MASK
    return (x ^ (x >> 29)) * 0x94D049BB133111EB & _MASK


def history_of(token_ids: Sequence[int]) -> int:
    """History after these tokens."""
    history = ROOT
    for token_id in token_ids:
        history = mix(history, token_id)
    return history


def next_token(history: int, seed: int, vocab_size: int, banned: Sequence[int] = ()) -> int:
    """The token that follows a history: a hash, and from there on the first that is not banned."""
    token_id = (mix(history, seed) >> 33) % vocab_size
    while token_id in banned:
        token_id = (token_id + 1) % vocab_size
    return token_id


@dataclass(frozen=True)
class Logprob:
    """Made-up log probabilities of one token after a history."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def logprob_of(history: int, token_id: int, count: int) -> Logprob:
    """What a shadow executor says of a token."""
    x = mix(history, token_id)
    top = tuple((mix(x, i) % 1000, -float(np.float32(i + x % 97) / 8)) for i in range(count - x % 2 if count else 0))
    return Logprob(-float(x % 4096) / 64, 1 + x % 50, top)


def columns_of(entries: Sequence[Logprob]) -> LogprobColumns:
    """Log probabilities as columns."""
    return LogprobColumns(
        np.array([one.logprob for one in entries], np.float32),
        np.array([one.rank for one in entries], np.int32),
        np.array([len(one.top) for one in entries], np.int32),
        np.array([token_id for one in entries for token_id, _ in one.top], np.int32),
        np.array([value for one in entries for _, value in one.top], np.float32),
    )


def entries_of(columns: LogprobColumns) -> list[Logprob]:
    """Columns as log probabilities."""
    ends = np.cumsum(columns.top_counts).tolist()
    top = list(zip(columns.top_token_ids.tolist(), columns.top_logprobs.tolist(), strict=True))
    return [
        Logprob(logprob, rank, tuple(top[end - count : end]))
        for logprob, rank, count, end in zip(
            columns.logprobs.tolist(), columns.ranks.tolist(), columns.top_counts.tolist(), ends, strict=True
        )
    ]


@dataclass
class Expected:
    """What a request must answer."""

    token_ids: list[int]
    stops: bool  # rather than reaching its length
    logprobs: list[Logprob]
    prompt_logprobs: list[Logprob]  # of positions 1 and on


def answer(prompt: Sequence[int], max_tokens: int, sampling: SamplingParams, vocab_size: int) -> Expected:
    """What a request must answer, computed alone and step by step."""
    expected = Expected([], False, [], [])
    history = ROOT
    for position, token_id in enumerate(prompt):
        if position and sampling.num_prompt_logprobs is not None:
            expected.prompt_logprobs.append(logprob_of(history, token_id, sampling.num_prompt_logprobs))
        history = mix(history, token_id)
    output = expected.token_ids
    while len(output) < max_tokens and not expected.stops:
        banned = sampling.stop_token_ids if len(output) < sampling.min_tokens else ()
        token_id = next_token(history, sampling.seed, vocab_size, banned)
        if sampling.num_logprobs is not None:
            expected.logprobs.append(logprob_of(history, token_id, sampling.num_logprobs))
        output.append(token_id)
        expected.stops = token_id in sampling.stop_token_ids or (sampling.encoded == GRAMMAR and token_id % 5 == 0)
        history = mix(history, token_id)
    return expected


def oracle(
    prompt: list[int], max_tokens: int, seed: int, stop_token_ids: tuple[int, ...], vocab_size: int
) -> list[int]:
    """The tokens that a plain request must answer."""
    sampling = SamplingParams(seed=seed, stop_token_ids=stop_token_ids)
    return answer(prompt, max_tokens, sampling, vocab_size).token_ids


class PlanError(AssertionError):
    """A plan would have corrupted a real executor."""


class ExecutorDiedError(Exception):
    """A poisonous request was run."""


@dataclass
class _Row:
    table: list[int]
    admission: Admission
    log: list[int]  # empty where the admission brings none
    computed: int | None = None  # None until its first step says where the cached prefix ends
    histories: list[int] = field(default_factory=list)  # of this admission's own positions
    first: int = 0
    last_token: int | None = None


class ShadowExecutor:
    """Applies plans strictly in order. Its KV memory maps a slot to the history of the token written there.

    ``skew`` makes it compute other tokens than its fellows: an audit must see that.
    """

    def __init__(self, capacity: ExecutorCapacity, skew: int = 0) -> None:
        self.capacity = capacity
        self.step_id = 0
        self.rows: dict[int, _Row] = {}
        self.memory: dict[int, int] = {}
        self._skew = skew

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step.

        Raises:
            PlanError: the plan breaks a rule of execution.proto, or reads KV that is not the row's own history.
            ExecutorDiedError: a poisonous request has come to its third token.
        """
        self._require(plan.step_id == self.step_id + 1, f"step {plan.step_id} after {self.step_id}")
        self.step_id = plan.step_id
        for row in plan.released_rows.tolist():
            self._require(row in self.rows, f"row {row} released twice")
            del self.rows[row]
        for admission in plan.admissions:
            self._admit(admission)
        for row, block in zip(plan.extend_rows.tolist(), plan.extend_blocks.tolist(), strict=True):
            self.rows[row].table.append(block)
        self._check_batch(plan)
        self._compute(plan)
        return self._results(plan)

    def _admit(self, admission: Admission) -> None:
        sampling, log = admission.sampling, admission.token_ids.tolist()
        self._require(admission.row not in self.rows, f"row {admission.row} admitted twice")
        self._require(0 <= admission.row < self.capacity.max_rows, "row out of range")
        self._require(log or not (sampling.needs_log or admission.audit_from), "a log is missing")
        self._require(sampling.needs_log or sampling.num_prompt_logprobs is None, "prompt logprobs need the log")
        is_audit_within = not admission.audit_from or admission.num_prompt_tokens <= admission.audit_from < len(log)
        self._require(is_audit_within, "audit of the prompt, or of nothing")
        self.rows[admission.row] = _Row(admission.block_ids.tolist(), admission, log)

    def _check_batch(self, plan: StepPlan) -> None:
        capacity = self.capacity
        self._require(0 < plan.num_tokens.sum() <= capacity.max_batched_tokens, "token budget")
        self._require((plan.num_tokens > 0).all(), "a row without tokens")
        self._require(len(plan.slot_mapping) == plan.num_tokens.sum(), "slot mapping's length")
        self._require(len(set(plan.rows.tolist())) == len(plan.rows), "a row is scheduled twice")
        self._require({one.row for one in plan.admissions} <= set(plan.rows.tolist()), "an admission without a step")
        self._require(len(set(plan.slot_mapping.tolist())) == len(plan.slot_mapping), "a slot is written twice")
        is_prefill = (plan.flags & EXPLICIT) != 0
        self._require((np.diff(is_prefill.astype(int)) >= 0).all(), "decodes come first")
        self._require(len(plan.prefill_token_ids) == plan.num_tokens[is_prefill].sum(), "prefill tokens' length")
        for row, table_hash in zip(plan.rows.tolist(), plan.table_hashes.tolist(), strict=True):
            table = np.array(self.rows[row].table, np.int32)
            self._require(((table >= 0) & (table < capacity.num_blocks)).all(), "block out of range")
            self._require(extend_table_hash(0, table) == table_hash, f"row {row}: table hash")

    def _compute(self, plan: StepPlan) -> None:
        """All rows write their KV first, then every row reads all it may attend to, as a kernel would."""
        tokens = iter(plan.prefill_token_ids.tolist())
        slots = iter(plan.slot_mapping.tolist())
        for number, count, start, flags in _columns(plan):
            row = self.rows[number]
            self._begin(row, number, start)
            for position in range(start, start + count):
                token = next(tokens) if flags & EXPLICIT else row.last_token
                self._require(token is not None, f"row {number}: no last token yet")
                if position < len(row.log):
                    self._require(row.log[position] == token, f"row {number}: the log has another token")
                slot = next(slots)
                self._require(slot == self._slot(row, position), f"row {number}: slot of position {position}")
                previous = self.memory[self._slot(row, position - 1)] if position else ROOT
                self.memory[slot] = mix(previous, token)
                row.histories.append(self.memory[slot])
            row.computed = start + count
        for number in plan.rows.tolist():
            self._check_own_history(self.rows[number], number)

    def _results(self, plan: StepPlan) -> StepResult:
        token_ids: list[int] = []
        ended: list[int] = []
        logprobs: list[Logprob] = []
        prompt_logprobs: list[RowPromptLogprobs] = []
        audited, mismatches = 0, []
        for number, count, start, flags in _columns(plan):
            row = self.rows[number]
            sampling = row.admission.sampling
            found = self._prompt_logprobs(row, start, start + count)
            if found:
                prompt_logprobs.append(RowPromptLogprobs(number, start + 1, columns_of(found)))
            wrong = self._audit(row, start, start + count)
            audited += len(wrong)
            mismatches += [number] * sum(wrong)
            if flags & SAMPLE:
                token_id = self._sample(row, start + count - 1)
                row.last_token = token_id
                token_ids.append(token_id)
                ended.append(sampling.encoded == GRAMMAR and token_id % 5 == 0)
                if sampling.num_logprobs is not None:
                    logprobs.append(logprob_of(row.histories[-1], token_id, sampling.num_logprobs))
                if sampling.encoded == POISON and start + count - row.admission.num_prompt_tokens >= 2:
                    raise ExecutorDiedError
        return StepResult(
            plan.step_id,
            np.array(token_ids, np.int32),
            timings=StepTimings(),
            logprobs=columns_of(logprobs) if logprobs else None,
            prompt_logprobs=tuple(prompt_logprobs),
            audited_tokens=audited,
            audit_mismatch_rows=np.array(mismatches, np.int32),
            grammar_ended=np.array(ended if any(ended) else [], np.uint8),
        )

    def _sample(self, row: _Row, position: int) -> int:
        """The token after ``position``."""
        admission = row.admission
        sampling = admission.sampling
        num_output = position + 1 - admission.num_prompt_tokens
        banned = sampling.stop_token_ids if num_output < sampling.min_tokens else ()
        history = row.histories[position - row.first]
        return next_token(history, sampling.seed + self._skew, self.capacity.vocab_size, banned)

    def _prompt_logprobs(self, row: _Row, start: int, end: int) -> list[Logprob]:
        """Of the prompt tokens whose logits these positions compute."""
        count = row.admission.sampling.num_prompt_logprobs
        if count is None:
            return []
        last = min(end, row.admission.num_prompt_tokens - 1)
        return [
            logprob_of(row.histories[position - 1 - row.first], row.log[position], count)
            for position in range(start + 1, last + 1)
        ]

    def _audit(self, row: _Row, start: int, end: int) -> list[bool]:
        """Which of the audited tokens are not what the log has."""
        audit_from = row.admission.audit_from
        if not audit_from:
            return []
        positions = range(max(start + 1, audit_from), min(end, len(row.log) - 1) + 1)
        return [self._sample(row, position - 1) != row.log[position] for position in positions]

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


def _columns(plan: StepPlan) -> list[tuple[int, int, int, int]]:
    """(row, number of tokens, start position, flags) of every scheduled row."""
    columns = (plan.rows, plan.num_tokens, plan.start_positions, plan.flags)
    return list(zip(*(column.tolist() for column in columns), strict=True))
