"""What restricts sampled tokens and is known only while steps run: grammar matchers, as the step sees them.

The main thread calls a ``MaskSource`` in the order of plans: ``apply`` once a plan has been applied, then ``begin``
before the model runs, and ``fill`` once it has been launched, so that matchers work while the device does. ``accept``
is called by the thread that completes steps, in their order: the main thread on CPU (before the next plan is applied),
the copy-wait thread on CUDA (where the next step may already be in ``fill``, which then waits).
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from executor_service.step_plan import Admission, FaultCode, Int32s, PlanError, StepPlan, UInt8s

# Of an admission whose row has a grammar, so many tokens are audited at most: each needs a mask of its own.
MAX_GRAMMAR_AUDITS = 16


class Masks(Protocol):
    """What some of the tokens of a batch may be."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """Indices into the batch that is sampled, ascending, at least one."""

    def fill(self) -> Tensor:
        """Host int32 [len(rows), ceil(vocabulary / 32)]: bit b of word w allows id 32 * w + b, as llguidance has it.

        Waits until the rows' matchers have taken all earlier tokens. Bits past the vocabulary mean nothing. A row of
        which nothing is allowed fails, alone.
        """


class TokenMasks(Masks, Protocol):
    """The masks of one step's rows that have a matcher and sample. The memory that ``fill`` returns may be reused once
    ``accept`` has returned.
    """

    def accept(self, token_ids: Int32s, row_ok: NDArray[np.bool_]) -> UInt8s:
        """Take the step's sampled tokens, [S] like ``row_ok``; uint8 [S]: 1 where a grammar is complete with its token.

        Must not wait for another step. Rows that were not ok, or have no matcher, answer 0.
        """

    def abandon(self) -> None:
        """The step failed and ``accept`` will not be called: ``fill`` of the next step, which waits for it, raises."""


class MaskSource(Protocol):
    """Matchers of all rows that have a grammar."""

    def reset(self) -> None:
        """Forget all rows: a new epoch begins. Launched steps have run; ``accept`` of the last may still come."""

    def apply(self, plan: StepPlan) -> None:
        """Drop the matchers of ``plan.released_rows``, make those of ``plan.admissions`` that have a grammar.

        An admission's log past its prompt, ``token_ids[prompt_len:]``, is output that the matcher takes at once. A
        grammar that does not compile, or does not allow the log, allows nothing: that fails its row alone.
        """

    def begin(self, rows: Int32s) -> TokenMasks | None:
        """Masks for a step that samples ``rows``, in that order; None when none of them has a matcher."""

    def audit(self, at: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Masks:
        """Masks for tokens of logs that are sampled again, at the indices ``at`` of their batch.

        Each belongs to a row with a grammar, and to a position of its log from ``first_audited`` on; all int64 [A].
        """


class NoMasks:
    """An executor without matchers: it takes no row with a grammar."""

    def reset(self) -> None:
        """See MaskSource."""

    def apply(self, plan: StepPlan) -> None:
        """See MaskSource."""
        for admission in plan.admissions:
            if admission.sampling.grammar:
                raise PlanError(FaultCode.BAD_PLAN, f"row {admission.row} has a grammar, this executor has no matchers")

    def begin(self, rows: Int32s) -> TokenMasks | None:
        """See MaskSource."""
        return None

    def audit(self, at: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Masks:
        """See MaskSource."""
        raise PlanError(FaultCode.BAD_PLAN, f"row {rows[0]} has a grammar, this executor has no matchers")


def first_audited(admission: Admission) -> int:
    """The first position of an admission's log that is audited; 0 = none is."""
    if not admission.audit_from or not admission.sampling.grammar:
        return admission.audit_from
    return max(admission.audit_from, admission.token_ids.size - MAX_GRAMMAR_AUDITS)
