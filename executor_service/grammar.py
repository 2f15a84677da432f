"""Rows whose output follows a grammar: their matchers, and what these allow next."""

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from torch import Tensor

from executor_service.grammar_compiler import GrammarCompiler, GrammarError, first_line
from executor_service.masks import Masks, TokenMasks, first_audited
from executor_service.step_plan import Admission, Int32s, StepPlan, UInt8s

logger = logging.getLogger(__name__)

_BITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Matcher:
    """A matcher that has taken a row's log; ``audited`` are the masks of the log's last tokens, int32 [A, words]."""

    matcher: LLMatcher
    audited: NDArray[np.int32]


class GrammarRows:
    """Matchers by row, rebuilt from the token log at every admission.

    A matcher is made by a thread of its own, so that a grammar compiles while the step that admits its row computes,
    and steps that sample other rows only do not wait for it. A grammar that fails, however it does, allows nothing:
    that fails its row, and nothing else.
    """

    def __init__(self, compiler: GrammarCompiler, vocab_size: int) -> None:
        self._compiler = compiler
        self._words = -(-vocab_size // _BITS)
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._rows: dict[int, _RowMatcher] = {}
        self._threads: LLExecutor | None = None
        self._last_step: _StepMasks | None = None

    def reset(self) -> None:
        """See MaskSource."""
        for matcher in self._rows.values():
            matcher.drop()
        self._rows.clear()
        self._last_step = None

    def apply(self, plan: StepPlan) -> None:
        """See MaskSource."""
        if self._rows:
            for row in plan.released_rows.tolist():
                if (matcher := self._rows.pop(row, None)) is not None:
                    matcher.drop()
        for admission in plan.admissions:
            if admission.sampling.grammar:
                making = self._compiling.submit(self._make, admission)
                self._rows[admission.row] = _RowMatcher(making, first_audited(admission))

    def begin(self, rows: Int32s) -> TokenMasks | None:
        """See MaskSource."""
        if not self._rows:
            return None
        found = [(index, self._rows[row]) for index, row in enumerate(rows.tolist()) if row in self._rows]
        if not found:
            return None
        if self._threads is None:
            self._threads = LLExecutor()
        indices, matchers = zip(*found, strict=True)
        step = _StepMasks(np.array(indices, np.int64), matchers, self._words, self._threads, self._last_step)
        self._last_step = step
        return step

    def audit(self, at: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Masks:
        """See MaskSource."""
        return _AuditMasks(at, [self._rows[row] for row in rows.tolist()], positions.tolist(), self._words)

    def _make(self, admission: Admission) -> _Matcher:
        first = first_audited(admission) or admission.token_ids.size
        before, audited = np.split(admission.token_ids[admission.prompt_len :], [first - admission.prompt_len])
        try:
            matcher = self._compiler.matcher(admission.sampling.grammar, before.tolist())
            return _Matcher(matcher, self._follow(matcher, audited.tolist()))
        except GrammarError:
            raise
        except BaseException as error:  # a panic of the library's is no Exception
            raise GrammarError(f"{type(error).__name__}: {first_line(str(error))}") from error

    def _follow(self, matcher: LLMatcher, token_ids: list[int]) -> NDArray[np.int32]:
        """Have ``matcher`` take ``token_ids``; what it allowed in the place of each."""
        masks = np.zeros((len(token_ids), self._words), np.int32)
        for index, token_id in enumerate(token_ids):
            fill_next_token_bitmask(matcher, masks, index)
            if matcher.is_error():
                masks[index] = 0
            matcher.consume_token(token_id)
        return masks


class _RowMatcher:
    """A row's matcher, as soon as it is made. Used by one thread at a time."""

    def __init__(self, making: "Future[_Matcher]", first_audited: int) -> None:
        self._making = making
        self._first_audited = first_audited
        self._has_failed = False

    def drop(self) -> None:
        """Nobody will ask for it any more."""
        self._making.cancel()

    def get(self) -> LLMatcher | None:
        """The matcher, waiting until it is made; None once it has failed."""
        if self._has_failed:
            return None
        try:
            return self._making.result().matcher
        except GrammarError as error:
            self.fail(str(error))
            return None

    def audited(self, position: int) -> NDArray[np.int32] | None:
        """What was allowed at an audited ``position`` of the log, waiting until it is known; None after a failure."""
        return None if self.get() is None else self._making.result().audited[position - self._first_audited]

    def take(self, token_id: int) -> bool:
        """Advance by a token; whether nothing can follow."""
        matcher = self.get()
        return matcher is not None and matcher.consume_token(token_id) and matcher.is_stopped()

    def fail(self, reason: str) -> None:
        """Allow nothing any more."""
        self._has_failed = True
        logger.warning("a row fails with its grammar: %s", reason)


class _StepMasks:
    """See TokenMasks. It keeps the matchers that its rows had at launch: rows may change hands before ``accept``."""

    def __init__(
        self,
        rows: NDArray[np.int64],
        matchers: tuple[_RowMatcher, ...],
        words: int,
        threads: LLExecutor,
        previous: "_StepMasks | None",
    ) -> None:
        self.rows = rows
        self._matchers = matchers
        self._words = words
        self._threads = threads
        self._previous = previous
        self._settled = threading.Event()
        self._is_abandoned = False

    def fill(self) -> Tensor:
        """See TokenMasks."""
        if self._previous is not None:
            self._previous.wait()
            self._previous = None  # a chain would keep every step
        masks = np.zeros((len(self._matchers), self._words), np.int32)
        found = [(matcher, index) for index, row in enumerate(self._matchers) if (matcher := row.get()) is not None]
        if found:
            fill_next_token_bitmask_par(self._threads, found, masks)
        for matcher, index in found:
            if matcher.is_error():  # by a limit just now, or by a token or a log that it does not allow
                masks[index] = 0
                self._matchers[index].fail(first_line(matcher.get_error()))
        return torch.from_numpy(masks)

    def accept(self, token_ids: Int32s, row_ok: NDArray[np.bool_]) -> UInt8s:
        """See TokenMasks."""
        ended = np.zeros(token_ids.size, np.uint8)
        for index, matcher in zip(self.rows.tolist(), self._matchers, strict=True):
            if row_ok[index]:
                ended[index] = matcher.take(int(token_ids[index]))
        self._settled.set()
        return ended

    def abandon(self) -> None:
        """See TokenMasks."""
        self._is_abandoned = True
        self._settled.set()

    def wait(self) -> None:
        """Return once the matchers have taken the step's tokens. Raises RuntimeError when they never will."""
        self._settled.wait()
        if self._is_abandoned:
            raise RuntimeError("the step before failed")


class _AuditMasks:
    """See Masks. Nothing of it changes while steps run: the masks were made with the matchers."""

    def __init__(self, rows: NDArray[np.int64], matchers: list[_RowMatcher], positions: list[int], words: int) -> None:
        self.rows = rows
        self._matchers = matchers
        self._positions = positions
        self._words = words

    def fill(self) -> Tensor:
        """See Masks."""
        masks = np.zeros((len(self._matchers), self._words), np.int32)
        for mask, matcher, position in zip(masks, self._matchers, self._positions, strict=True):
            if (audited := matcher.audited(position)) is not None:
                mask[:] = audited
        return torch.from_numpy(masks)
