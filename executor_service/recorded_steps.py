"""Steps of decodes alone on a CPU, recorded when a number of rows is first seen and repeated from then on.

A small step is over sooner than Python has walked through the model; a repetition walks through a list of calls.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor_service.input_batch import InputBatch
from executor_service.metadata.attention import AttentionMetadata
from kernels.native.recording import NotRepeatableError, Recording, Scratch, record
from kernels.paged_attention import plan_attention

logger = logging.getLogger(__name__)

# Larger steps keep the cores busy for far longer than Python takes, and a recording holds some hundred kilobytes.
# Memory for results is shared by all.
_MAX_ROWS = 64

Forward = Callable[[Tensor, Tensor, AttentionMetadata], Tensor]


@dataclass(frozen=True, slots=True)
class _Step:
    recording: Recording  # fills the logits
    hidden: Tensor


class RecordedSteps:
    """Recordings of a model's decode steps, by their number of rows. Nothing is padded: rows cost time on a CPU."""

    def __init__(
        self,
        forward: Forward,
        head: Callable[[Tensor], Tensor],
        max_rows: int,
        max_blocks: int,
        block_size: int,
        group_size: int,
    ) -> None:
        """``forward`` maps int64 ids and positions [T] to hidden states [T, hidden], ``head`` these to logits; block
        tables have ``max_blocks`` at most. ``group_size`` as of ``plan_attention``.
        """
        self._forward = forward
        self._head = head
        self._block_size = block_size
        self._group_size = group_size
        self._max_rows = min(max_rows, _MAX_ROWS)
        self._scratch = Scratch()
        self._steps: dict[int, _Step] = {}
        # What recordings read of a step. Table entries past a row's length are never read: old ones may stay.
        self._input_ids, self._positions, self._slots = np.zeros((3, self._max_rows), np.int64)
        self._tables = np.zeros((self._max_rows, max_blocks), np.int32)
        self._starts = np.arange(self._max_rows + 1, dtype=np.int32)
        self._lengths = np.zeros(self._max_rows, np.int32)

    def run(self, batch: InputBatch) -> tuple[Tensor, Tensor] | None:
        """Hidden states and logits of ``batch``, valid until the next call; None where it is not a step of few decodes
        that all sample.
        """
        rows, width = batch.block_tables.shape
        tokens = batch.input_ids.shape[0]
        if not rows == tokens == batch.dimensions.tokens == batch.sample_indices.shape[0] <= self._max_rows:
            return None
        width = min(width, self._tables.shape[1])  # a wider table has nothing but the dummy block there
        self._input_ids[:rows] = batch.input_ids.numpy()
        self._positions[:rows] = batch.positions.numpy()
        self._slots[:rows] = batch.slot_mapping.numpy()
        self._tables[:rows, :width] = batch.block_tables.numpy()[:, :width]
        self._lengths[:rows] = batch.host_seq_lens
        step = self._steps.get(rows)
        if step is not None:
            step.recording.replay()
        else:
            step = self._record(rows)
        return None if step is None else (step.hidden, step.recording.output)

    def _record(self, rows: int) -> _Step | None:
        ids, positions, slots = (
            torch.from_numpy(values[:rows]) for values in (self._input_ids, self._positions, self._slots)
        )
        starts, lengths, tables = self._starts[: rows + 1], self._lengths[:rows], torch.from_numpy(self._tables[:rows])
        metadata = AttentionMetadata(slots, plan_attention(starts, lengths, tables, self._block_size, self._group_size))
        hidden: list[Tensor] = []

        def work() -> Tensor:
            hidden.append(self._forward(ids, positions, metadata))
            return self._head(hidden[0])

        try:
            step = _Step(record(work, self._scratch), self._scratch.without_claim(hidden[0]))
        except NotRepeatableError as error:
            logger.warning("decode steps are not recorded: %s", error)
            self._max_rows = 0
            return None
        self._steps[rows] = step
        return step
