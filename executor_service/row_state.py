"""State that belongs to a row between steps: its cursor, its sampling parameters, its last sampled token."""

import numpy as np
import torch
from numpy.typing import NDArray

from executor_service.step_plan import Admission, Int32s

UNSCHEDULED = -1
_INT32_MAX = 2**31 - 1


class RowState:
    """Struct of arrays over rows; everything but ``last_token`` is host numpy.

    Attributes:
        admitted: bool [max_rows], a request holds the row.
        cursor: int32 [max_rows], tokens whose KV exists once every launched step has run; UNSCHEDULED between an
            admission and its first step, since a prefix-cache hit may start it past 0.
        has_sampled: bool [max_rows], ``last_token[row]`` is the token that follows the cursor.
        temperature float32, top_k int32, top_p float32, seed int64: [max_rows], sampling parameters.
        last_token: int64 [max_rows + 1] on the device; the extra row takes what padding writes.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self.admitted = np.zeros(max_rows, np.bool_)
        self.cursor = np.full(max_rows, UNSCHEDULED, np.int32)
        self.has_sampled = np.zeros(max_rows, np.bool_)
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.seed = np.zeros(max_rows, np.int64)
        self.last_token = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)

    def clear(self, rows: Int32s | None = None) -> None:
        """Forget the requests in ``rows``; in all rows when None."""
        where = slice(None) if rows is None else rows
        self.admitted[where] = False
        self.cursor[where] = UNSCHEDULED
        self.has_sampled[where] = False

    def admit(self, admission: Admission) -> None:
        """Give ``admission.row``, which must be free, to a request."""
        row, sampling = admission.row, admission.sampling
        greedy = sampling.temperature == 0
        self.admitted[row] = True
        self.cursor[row] = UNSCHEDULED
        self.has_sampled[row] = False
        self.temperature[row] = sampling.temperature
        # a greedy row must not make a whole batch pay for filters that cannot change its token
        self.top_k[row] = 0 if greedy else min(sampling.top_k, _INT32_MAX)
        self.top_p[row] = 1.0 if greedy else sampling.top_p
        self.seed[row] = np.uint64(sampling.seed).astype(np.int64)

    def advance(self, rows: Int32s, ends: Int32s, sampled: NDArray[np.bool_]) -> None:
        """The step being launched computes ``rows`` up to ``ends``; those marked ``sampled`` sample a token."""
        self.cursor[rows] = ends
        self.has_sampled[rows] = sampled
