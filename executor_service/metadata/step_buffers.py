"""The tensors at fixed addresses that captured graphs read, and how a step is padded into them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.batch_dimensions import BatchDimensions
from executor_service.input_batch import InputBatch
from executor_service.upload import uploader_to
from kernels.paged_attention import DeviceLengths

_ALIGNMENT = 16  # elements: kernels are compiled for aligned addresses


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views of the buffers for one size: T tokens, R requests."""

    size: BatchDimensions
    input_ids: Tensor  # int64 [T]; padding 0
    positions: Tensor  # int64 [T]; padding 0
    slot_mapping: Tensor  # int64 [T]; padding lies in the dummy block
    block_tables: Tensor  # int32 [R, W]; whatever no request has is the dummy block
    lengths: DeviceLengths  # padded requests have no tokens
    # the same lengths on the host, for kernels that are planned there
    host_query_start_loc: NDArray[np.int32]
    host_seq_lens: NDArray[np.int32]


class StepBuffers:
    """Memory for the largest step. ``load`` costs a few small copies, in the order of the device's stream."""

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        dummy_block: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._dummy_block = dummy_block
        self._max_seq_len = max_blocks * block_size
        self._tokens = torch.zeros((2, max_tokens), dtype=torch.int64, device=device)
        self._dummy_slots = dummy_block * block_size + torch.arange(max_tokens, device=device) % block_size
        self._slots = self._dummy_slots.clone()
        self._block_tables = torch.full((max_requests, max_blocks), dummy_block, dtype=torch.int32, device=device)
        # query starts, key starts and lengths lie in one piece of memory, which one copy fills
        self._span = -(-(max_requests + 1) // _ALIGNMENT) * _ALIGNMENT
        self._lengths = torch.zeros(3 * self._span, dtype=torch.int32, device=device)
        self._host_lengths: NDArray[np.int32] = np.zeros(3 * self._span, np.int32)
        self._upload = uploader_to(device)
        # how far the last step reached: what it wrote past the next one becomes padding again
        self._used_tokens = self._used_rows = self._used_blocks = 0

    def view(self, size: BatchDimensions) -> StepInputs:
        """The buffers as a step of ``size`` sees them."""
        tokens, requests, span = size.tokens, size.requests, self._span
        host = self._host_lengths
        lengths = DeviceLengths(
            query_start_loc=self._lengths[: requests + 1],
            key_start_loc=self._lengths[span : span + requests + 1],
            seq_lens=self._lengths[2 * span : 2 * span + requests],
            max_query_len=1 if size.prefill_requests == 0 else size.tokens,
            max_seq_len=self._max_seq_len,
        )
        return StepInputs(
            size=size,
            input_ids=self._tokens[0, :tokens],
            positions=self._tokens[1, :tokens],
            slot_mapping=self._slots[:tokens],
            block_tables=self._block_tables[:requests],
            lengths=lengths,
            host_query_start_loc=host[: requests + 1],
            host_seq_lens=host[2 * span : 2 * span + requests],
        )

    def load(self, batch: InputBatch) -> None:
        """Copy ``batch`` in, and pad it to whatever size is looked at."""
        tokens = batch.dimensions.tokens
        self._tokens[0, :tokens].copy_(batch.input_ids[:tokens])
        self._tokens[1, :tokens].copy_(batch.positions[:tokens])
        self._slots[:tokens].copy_(batch.slot_mapping[:tokens])
        if tokens < self._used_tokens:
            stale = slice(tokens, self._used_tokens)
            self._tokens[:, stale].zero_()
            self._slots[stale].copy_(self._dummy_slots[stale])
        self._used_tokens = tokens
        self._load_tables(batch.block_tables)
        self._load_lengths(batch.host_query_start_loc, batch.host_seq_lens)

    def clear(self) -> None:
        """Nothing but padding, as in a capture."""
        self._tokens.zero_()
        self._slots.copy_(self._dummy_slots)
        self._block_tables.fill_(self._dummy_block)
        self._used_tokens = self._used_rows = self._used_blocks = 0
        self._load_lengths(np.zeros(1, np.int32), np.zeros(0, np.int32))

    def _load_tables(self, tables: Tensor) -> None:
        rows, blocks = tables.shape
        if rows < self._used_rows or blocks < self._used_blocks:
            self._block_tables[: self._used_rows, : self._used_blocks].fill_(self._dummy_block)
        blocks = min(blocks, self._block_tables.shape[1])  # a wider table has nothing but the dummy block there
        self._block_tables[:rows, :blocks].copy_(tables[:, :blocks])
        self._used_rows, self._used_blocks = rows, blocks

    def _load_lengths(self, query_start_loc: NDArray[np.int32], seq_lens: NDArray[np.int32]) -> None:
        requests, span, host = seq_lens.size, self._span, self._host_lengths
        starts, key_starts, lengths = host[:span], host[span : 2 * span], host[2 * span :]
        starts[: requests + 1] = query_start_loc
        starts[requests + 1 :] = query_start_loc[-1]
        lengths[:requests] = seq_lens
        lengths[requests:] = 0
        np.cumsum(lengths[:-1], out=key_starts[1:])
        staged = self._upload(host)
        self._upload.send()
        self._lengths.copy_(staged)
