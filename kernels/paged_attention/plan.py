"""What attention must know of a step, the same for all layers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.paged_attention.tiling import Tiling, tile_step


@dataclass(frozen=True, slots=True)
class DeviceLengths:
    """A step's lengths as kernels on a device read them, with the bounds that grids are made for.

    Requests may be padded: they have no query tokens, their keys count 0, and starts repeat the last value.
    """

    query_start_loc: Tensor  # int32 [R + 1]
    key_start_loc: Tensor  # int32 [R + 1]: running sum of seq_lens
    seq_lens: Tensor  # int32 [R]
    max_query_len: int  # no request has more query tokens
    max_seq_len: int  # nor more keys


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Whose tokens a step computes and where their keys lie; what a kernel derives from it is derived once."""

    query_start_loc: NDArray[np.int32]  # [R + 1]
    seq_lens: NDArray[np.int32]  # [R]
    block_tables: Tensor  # int32 [R, W], rows contiguous
    block_size: int
    group_size: int  # query heads per key-value head
    device_lengths: DeviceLengths | None = None  # None: made from the host's, when a kernel first asks

    @property
    def num_tokens(self) -> int:
        """Real tokens: the first ones of the batch."""
        return int(self.query_start_loc[-1])

    @cached_property
    def tiling(self) -> Tiling:
        """The tiles of the torch reference."""
        return tile_step(self.query_start_loc, self.seq_lens, self.block_tables, self.block_size, self.group_size)

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        """Of query_start_loc, seq_lens and block_tables."""
        return self.query_start_loc.ctypes.data, self.seq_lens.ctypes.data, self.block_tables.data_ptr()

    @cached_property
    def on_device(self) -> DeviceLengths:
        """The lengths beside the block tables."""
        if self.device_lengths is not None:
            return self.device_lengths
        key_start_loc = np.zeros(self.seq_lens.size + 1, np.int32)
        np.cumsum(self.seq_lens, out=key_start_loc[1:])
        device = self.block_tables.device
        starts, key_starts, lengths = (
            torch.from_numpy(values).to(device, non_blocking=True)
            for values in (self.query_start_loc, key_start_loc, self.seq_lens)
        )
        return DeviceLengths(
            query_start_loc=starts,
            key_start_loc=key_starts,
            seq_lens=lengths,
            max_query_len=int(np.diff(self.query_start_loc).max(initial=0)),
            max_seq_len=int(self.seq_lens.max(initial=0)),
        )


def plan_attention(
    query_start_loc: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    block_tables: Tensor,
    block_size: int,
    group_size: int,
    device_lengths: DeviceLengths | None = None,
) -> AttentionPlan:
    """Plan ``paged_attention`` for a step of R requests.

    query_start_loc: int32 [R + 1], seq_lens: int32 [R], on the host: request r has tokens query_start_loc[r] to
    query_start_loc[r + 1] at consecutive positions that end at seq_lens[r] - 1.
    block_tables: int32 [R, W] on the device; only their values are used there, never waited for.
    device_lengths: the same lengths beside the block tables, for a step that a graph holds; kernels that read only
    these run right however often their values change.
    """
    return AttentionPlan(
        np.ascontiguousarray(query_start_loc, np.int32),
        np.ascontiguousarray(seq_lens, np.int32),
        block_tables.contiguous(),
        block_size,
        group_size,
        device_lengths,
    )
