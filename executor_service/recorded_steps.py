"""Steps on a CPU as lists of native calls, which are there before the first of them runs.

Between kernels, which leave nothing of Python in the processor's caches, walking through the model would take ten times
as long. Steps of decodes alone are recorded once for all numbers of rows, and so are all layers but the last of any
other step; what is left of it depends on the tokens that are wanted, and is recorded each time.
"""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from executor_service.context import InferenceContext, inference_context
from executor_service.input_batch import InputBatch
from executor_service.memory import available_ram
from executor_service.metadata.attention import AttentionMetadata
from executor_service.models import CausalLM
from kernels.native.memory import Scratch
from kernels.native.recording import NotRepeatableError, Recording, record
from kernels.native.sized_recording import SizedRecording, record_sized
from kernels.paged_attention import plan_attention

logger = logging.getLogger(__name__)

Work = Callable[[], tuple[Tensor, ...]]


class RecordedSteps:
    """Recordings of a model's steps. Nothing is padded: rows cost time on a CPU."""

    def __init__(
        self, model: CausalLM, max_tokens: int, max_rows: int, max_blocks: int, block_size: int, group_size: int
    ) -> None:
        """Steps have so many tokens, rows and blocks of a row at most. ``group_size`` as of ``plan_attention``.

        All memory is taken now that the results of the largest step need, rather than page by page while streams wait
        for it. Raises ``MemoryError`` if there is not as much RAM.
        """
        self._model = model
        self._block_size = block_size
        self._group_size = group_size
        self._max_tokens, self._max_rows = max_tokens, min(max_rows, max_tokens)
        # What recordings read of a step. Table entries past a row's length are never read: old ones may stay.
        self._input_ids, self._positions, self._slots = np.zeros((3, max_tokens), np.int64)
        self._tables = np.zeros((self._max_rows, max_blocks), np.int32)
        self._starts = np.zeros(self._max_rows + 1, np.int32)
        self._lengths = np.zeros(self._max_rows, np.int32)
        self._scratch = Scratch()
        self._first_layers_scratch = Scratch()
        self._decode: SizedRecording[tuple[Tensor, Tensor]] | None = None
        self._first_layers: SizedRecording[tuple[Tensor | None, Tensor, Tensor, Tensor]] | None = None
        self._is_repeatable = True
        try:
            self._record_all_sizes()
        except NotRepeatableError as error:
            self._give_up(error)

    def run(self, work: Work) -> tuple[Tensor, ...]:
        """What ``work`` returns; it does nothing but call kernels."""
        recording = self._record(work)
        return work() if recording is None else recording.run()

    def decode(self, batch: InputBatch) -> tuple[Tensor, Tensor] | None:
        """Hidden states and logits of ``batch``, valid until the next step. None where it is not a step of decodes
        that all sample and want nothing else, and while results of another step are in use.
        """
        rows, tokens = batch.block_tables.shape[0], batch.input_ids.shape[0]
        if not rows == tokens == batch.dimensions.tokens == batch.sample_indices.shape[0] <= self._max_rows:
            return None
        if batch.audits or batch.prompt_targets is not None or not self._scratch.is_idle or self._decode is None:
            return None
        self._load(batch)
        return self._decode.run(rows)

    def compute(self, batch: InputBatch, context: InferenceContext) -> tuple[Tensor, ...]:
        """As ``hidden_and_logits``, of any step."""
        tokens, rows = batch.input_ids.shape[0], batch.block_tables.shape[0]
        fits = tokens == batch.dimensions.tokens <= self._max_tokens and rows <= self._max_rows
        if fits and (first_layers := self._first_layers) is not None:
            last_layer = partial(self._model.last_layer, *first_layers.results(tokens))
            if (rest := self._record(partial(hidden_and_logits, self._model, last_layer, context))) is not None:
                self._load(batch)
                first_layers.run(tokens, rows)
                return rest.run()
        forward = partial(self._model, batch.input_ids, batch.positions)
        return self.run(partial(hidden_and_logits, self._model, forward, context))

    def _load(self, batch: InputBatch) -> None:
        tokens, (rows, width) = batch.input_ids.shape[0], batch.block_tables.shape
        width = min(width, self._tables.shape[1])  # a wider table has nothing but the dummy block there
        self._input_ids[:tokens] = batch.input_ids.numpy()
        self._positions[:tokens] = batch.positions.numpy()
        self._slots[:tokens] = batch.slot_mapping.numpy()
        self._tables[:rows, :width] = batch.block_tables.numpy()[:, :width]
        self._starts[: rows + 1] = batch.host_query_start_loc
        self._lengths[:rows] = batch.host_seq_lens

    def _record_all_sizes(self) -> None:
        self._first_layers = record_sized(
            self._compute_first_layers, [self._max_tokens, self._max_rows], self._first_layers_scratch
        )
        self._decode = record_sized(self._compute_decode, [self._max_rows], self._scratch)
        record(self._compute_rest_of_largest, self._scratch)
        size = self._scratch.size + self._first_layers_scratch.size
        if size > available_ram():
            raise MemoryError(f"results take {size} bytes, which are not there")
        self._scratch.touch()
        self._first_layers_scratch.touch()

    def _compute_first_layers(self, tokens: int, rows: int) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        with inference_context(InferenceContext(self._metadata(tokens, rows))):
            return self._model.first_layers(*self._tokens(tokens))

    def _compute_decode(self, rows: int) -> tuple[Tensor, Tensor]:
        with inference_context(InferenceContext(self._metadata(rows, rows))):
            hidden = self._model(*self._tokens(rows))
        return hidden, self._model.compute_logits(hidden)

    def _compute_rest_of_largest(self) -> tuple[Tensor, ...]:
        assert self._first_layers is not None
        with inference_context(InferenceContext(self._metadata(self._max_tokens, self._max_rows))):
            hidden = self._model.last_layer(*self._first_layers.results(self._max_tokens))
        return hidden, self._model.compute_logits(hidden[: self._max_rows])

    def _tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """Ids and positions of so many tokens, whatever they are when a recording runs."""
        return torch.from_numpy(self._input_ids[:count]), torch.from_numpy(self._positions[:count])

    def _metadata(self, tokens: int, rows: int) -> AttentionMetadata:
        self._starts[rows] = tokens
        tables = torch.from_numpy(self._tables[:rows])
        starts, lengths = self._starts[: rows + 1], self._lengths[:rows]
        plan = plan_attention(starts, lengths, tables, self._block_size, self._group_size)
        return AttentionMetadata(torch.from_numpy(self._slots[:tokens]), plan)

    def _record(self, work: Work) -> Recording | None:
        if not self._is_repeatable:
            return None
        try:
            return record(work, self._scratch)
        except NotRepeatableError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: NotRepeatableError) -> None:
        logger.warning("steps are not recorded: %s", error)
        self._is_repeatable = False
        self._decode = self._first_layers = None


def hidden_and_logits(model: CausalLM, forward: Callable[[], Tensor], context: InferenceContext) -> tuple[Tensor, ...]:
    """Hidden states that ``forward`` returns in ``context``, and the logits of those of the rows that it wants, if it
    wants any alone.
    """
    with inference_context(context):
        hidden = forward()
    return (hidden,) if context.output_rows is None else (hidden, model.compute_logits(hidden))
