"""Steps in flight: the ledger of dispatched plans, and how many of them an executor may have."""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.row_table import Rows
from scheduler_service.core.step_plan import Int32s, StepTimings

MAX_RUN_AHEAD = 8
_INITIAL_RUN_AHEAD = 2
_STARVED_STEPS_TO_GROW = 2
_WINDOW_TO_SHRINK = 64
_NEVER_BELOW_WHILE_ADAPTING = 2


class ResultMismatchError(Exception):
    """A result does not belong to the oldest step in flight, or does not have its shape."""


@dataclass(frozen=True, slots=True)
class InflightStep:
    """What has to be known to settle a step: who held which row when it was dispatched.

    Attributes:
        samples: indices of the sampling rows; None when every row samples.
        logprob_samples: which of the sampled tokens come with log probabilities; None when none does.
    """

    step_id: int
    rows: Rows
    admissions: NDArray[np.int64]
    end_positions: Int32s
    samples: NDArray[np.intp] | None
    logprob_samples: NDArray[np.intp] | None
    num_tokens: int
    after_idle: bool

    @property
    def num_samples(self) -> int:
        return len(self.rows) if self.samples is None else len(self.samples)

    def samples_of_rows(self) -> NDArray[np.intp]:
        """How many tokens each of ``rows`` samples: 1 or 0."""
        counts = np.full(len(self.rows), self.samples is None, np.intp)
        if self.samples is not None:
            counts[self.samples] = 1
        return counts

    @property
    def num_logprobs(self) -> int:
        return 0 if self.logprob_samples is None else len(self.logprob_samples)


class InflightLedger:
    """Dispatched steps in order. In-flight counts are derived from it and never kept elsewhere."""

    def __init__(self) -> None:
        self._steps: deque[InflightStep] = deque()
        self.num_dispatched_steps = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def settled_step(self) -> int:
        """Id of the last settled step; step ids start at 1."""
        return self.num_dispatched_steps - len(self._steps)

    @property
    def next_step_id(self) -> int:
        return self.num_dispatched_steps + 1

    def push(self, step: InflightStep) -> None:
        """A step has been dispatched."""
        self._steps.append(step)
        self.num_dispatched_steps += 1
        self.num_tokens += step.num_tokens

    def expect(self, step_id: int, num_results: int) -> InflightStep:
        """The oldest step, of which a result has come.

        Raises:
            ResultMismatchError: ``step_id`` is not the oldest in flight, or it samples another number of tokens.
        """
        if not self._steps or self._steps[0].step_id != step_id:
            raise ResultMismatchError(f"result of step {step_id}, expected {self.settled_step + 1}")
        step = self._steps[0]
        if step.num_samples != num_results:
            raise ResultMismatchError(f"step {step_id} answered {num_results} tokens, expected {step.num_samples}")
        return step

    def pop(self) -> None:
        """The oldest step is settled."""
        self.num_tokens -= self._steps.popleft().num_tokens

    def steps(self) -> list[InflightStep]:
        """Steps in flight, oldest first."""
        return list(self._steps)


class RunAhead:
    """How many unacknowledged plans an executor may have: fixed, or adapted from what it reports.

    Grows by one when two steps in a row starved although there was work, shrinks by one when at least two plans lay
    waiting during each of 64 steps.
    """

    def __init__(self, fixed: int | None) -> None:
        self.depth = fixed or _INITIAL_RUN_AHEAD
        self._adapts = fixed is None
        self._starved_steps = 0
        self._window_steps = 0
        self._window_min_queued = MAX_RUN_AHEAD

    def observe(self, timings: StepTimings, *, after_idle: bool) -> None:
        """Learn from one settled step; ``after_idle``: waiting for it was no starvation."""
        if not self._adapts:
            return
        starved = timings.starved_us > 0 and not after_idle
        self._starved_steps = self._starved_steps + 1 if starved else 0
        if self._starved_steps >= _STARVED_STEPS_TO_GROW:
            self._set(min(self.depth + 1, MAX_RUN_AHEAD))
            return
        self._window_steps += 1
        self._window_min_queued = min(self._window_min_queued, timings.plans_queued)
        if self._window_steps == _WINDOW_TO_SHRINK:
            surplus = self._window_min_queued >= 2
            self._set(max(self.depth - 1, _NEVER_BELOW_WHILE_ADAPTING) if surplus else self.depth)

    def _set(self, depth: int) -> None:
        self.depth = depth
        self._starved_steps = 0
        self._window_steps = 0
        self._window_min_queued = MAX_RUN_AHEAD
