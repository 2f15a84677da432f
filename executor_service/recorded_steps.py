"""Steps on a CPU as lists of native calls, which Python makes before the first of them runs.

Between kernels, which leave nothing of Python in the processor's caches, it would take ten times as long. Steps of few
decodes are recorded when a number of rows is first seen and repeated from then on: they are over sooner than Python has
walked through the model at all.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from executor_service.input_batch import InputBatch
from executor_service.memory import available_ram
from executor_service.metadata.attention import AttentionMetadata
from kernels.native.memory import Scratch
from kernels.native.recording import NotRepeatableError, Recording, record
from kernels.paged_attention import plan_attention

logger = logging.getLogger(__name__)

# Larger steps keep the cores busy for far longer than Python takes, and a recording holds some hundred kilobytes.
_MAX_ROWS = 64

Work = Callable[[], tuple[Tensor, ...]]
Forward = Callable[[Tensor, Tensor, AttentionMetadata], Tensor]


class RecordedSteps:
    """Recordings of a model's steps; those of decodes are kept, by their number of rows. Nothing is padded: rows cost
    time on a CPU.
    """

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
        self._is_repeatable = True
        self._scratch = Scratch()
        self._recordings: dict[int, Recording] = {}
        # What recordings read of a step. Table entries past a row's length are never read: old ones may stay.
        self._input_ids, self._positions, self._slots = np.zeros((3, self._max_rows), np.int64)
        self._tables = np.zeros((self._max_rows, max_blocks), np.int32)
        self._starts = np.arange(self._max_rows + 1, dtype=np.int32)
        self._lengths = np.zeros(self._max_rows, np.int32)

    def reserve(self, tokens: int, rows: int) -> None:
        """Take all memory now that a step of ``tokens``, of which ``rows`` are sampled, needs for its results, rather
        than page by page while streams wait for it. Raises ``MemoryError`` if there is not as much RAM.
        """
        ids, positions, slots = torch.zeros(3, tokens, dtype=torch.int64)
        starts, lengths = np.array([0, tokens], np.int32), np.array([tokens], np.int32)
        tables = torch.zeros(1, -(-tokens // self._block_size), dtype=torch.int32)
        metadata = AttentionMetadata(slots, plan_attention(starts, lengths, tables, self._block_size, self._group_size))

        def work() -> tuple[Tensor, ...]:
            hidden = self._forward(ids, positions, metadata)
            return hidden, self._head(hidden[:rows])

        if self._record(work) is None:  # else all results have been laid out, and are free again
            return
        size = self._scratch.size
        if size > available_ram():
            raise MemoryError(f"results take {size} bytes, which are not there")
        self._scratch.touch()

    def run(self, work: Work) -> tuple[Tensor, ...]:
        """What ``work`` returns; it does nothing but call kernels."""
        recording = self._record(work)
        return work() if recording is None else recording.run()

    def repeat(self, batch: InputBatch) -> tuple[Tensor, ...] | None:
        """Hidden states and logits of ``batch``, valid until the next step. None where it is not a step of few decodes
        that all sample and want nothing else, and while results of ``run`` are in use.
        """
        rows, width = batch.block_tables.shape
        tokens = batch.input_ids.shape[0]
        if not rows == tokens == batch.dimensions.tokens == batch.sample_indices.shape[0] <= self._max_rows:
            return None
        if batch.audits or batch.prompt_targets is not None or not self._scratch.is_idle:
            return None
        width = min(width, self._tables.shape[1])  # a wider table has nothing but the dummy block there
        self._input_ids[:rows] = batch.input_ids.numpy()
        self._positions[:rows] = batch.positions.numpy()
        self._slots[:rows] = batch.slot_mapping.numpy()
        self._tables[:rows, :width] = batch.block_tables.numpy()[:, :width]
        self._lengths[:rows] = batch.host_seq_lens
        recording = self._recordings.get(rows)
        if recording is None:
            recording = self._record(self._decode(rows))
            if recording is None:
                return None
            recording.share()
            self._recordings[rows] = recording
        return recording.run()

    def _decode(self, rows: int) -> Work:
        """A step of the first ``rows`` rows, whatever they are when it runs."""
        ids, positions, slots = (
            torch.from_numpy(values[:rows]) for values in (self._input_ids, self._positions, self._slots)
        )
        starts, lengths, tables = self._starts[: rows + 1], self._lengths[:rows], torch.from_numpy(self._tables[:rows])
        metadata = AttentionMetadata(slots, plan_attention(starts, lengths, tables, self._block_size, self._group_size))

        def work() -> tuple[Tensor, ...]:
            hidden = self._forward(ids, positions, metadata)
            return hidden, self._head(hidden)

        return work

    def _record(self, work: Work) -> Recording | None:
        if not self._is_repeatable:
            return None
        try:
            return record(work, self._scratch)
        except NotRepeatableError as error:
            logger.warning("steps are not recorded: %s", error)
            self._is_repeatable = False
            return None
