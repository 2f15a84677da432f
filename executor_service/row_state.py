"""State that belongs to a row between steps: its cursor, its last sampled token, what its sampling needs."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.input_batch import LogAppend
from executor_service.sampling_state import SamplingState
from executor_service.step_plan import Admission, Int32s

UNSCHEDULED = -1


class RowState:
    """Struct of arrays over rows; everything but ``last_token`` is host numpy.

    Attributes:
        admitted: bool [max_rows], a request holds the row.
        cursor: int32 [max_rows], tokens whose KV exists once every launched step has run; UNSCHEDULED between an
            admission and its first step, since a prefix-cache hit may start it past 0.
        has_sampled: bool [max_rows], ``last_token[row]`` is the token that follows the cursor.
        sampling: the rows' sampling parameters and what belongs to them.
        last_token: int64 [max_rows + 1] on the device; the extra row takes what padding writes.
    """

    def __init__(self, max_rows: int, max_model_len: int, vocab_size: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self.admitted = np.zeros(max_rows, np.bool_)
        self.cursor = np.full(max_rows, UNSCHEDULED, np.int32)
        self.has_sampled = np.zeros(max_rows, np.bool_)
        self.sampling = SamplingState(max_rows, max_model_len, vocab_size, device)
        self.last_token = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)

    def clear(self, rows: Int32s | None = None) -> None:
        """Forget the requests in ``rows``; in all rows when None."""
        where = slice(None) if rows is None else rows
        self.admitted[where] = False
        self.cursor[where] = UNSCHEDULED
        self.has_sampled[where] = False
        self.sampling.clear(where)

    def admit(self, admission: Admission) -> None:
        """Give ``admission.row``, which must be free, to a request."""
        row = admission.row
        self.admitted[row] = True
        self.cursor[row] = UNSCHEDULED
        self.has_sampled[row] = False
        self.sampling.admit(admission)

    def advance(self, rows: Int32s, ends: Int32s, sampled: NDArray[np.bool_]) -> None:
        """The step being launched computes ``rows`` up to ``ends``; those marked ``sampled`` sample a token."""
        self.cursor[rows] = ends
        self.has_sampled[rows] = sampled

    def take_last(self, rows: Tensor, out: Tensor) -> None:
        """Write the last tokens of ``rows``, int64 [N] on the device, to ``out``."""
        if out.is_cpu:
            out.numpy()[:] = self.last_token.numpy()[rows.numpy()]
        else:
            torch.index_select(self.last_token, 0, rows, out=out)

    def record(self, sampled_rows: Tensor, token_ids: Tensor, append: LogAppend | None) -> None:
        """Keep what a step sampled, int64 [S] like ``sampled_rows``, on the device: nobody waits for the values."""
        if token_ids.is_cpu:  # in numpy: a step of few rows feels what an operation of torch costs
            self.last_token.numpy()[sampled_rows.numpy()] = token_ids.numpy()
        else:
            self.last_token.index_copy_(0, sampled_rows, token_ids)
        if append is not None:
            tokens = token_ids.index_select(0, append.sampled).int()
            self.sampling.log.tensor.index_put_((append.rows, append.positions), tokens)
