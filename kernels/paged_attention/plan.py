"""What attention must know of a step, the same for all layers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.paged_attention.tiling import Tiling, tile_step


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Whose tokens a step computes and where their keys lie; what a kernel derives from it is derived once."""

    query_start_loc: NDArray[np.int32]  # [R + 1]
    seq_lens: NDArray[np.int32]  # [R]
    block_tables: Tensor  # int32 [R, W], contiguous
    block_size: int
    group_size: int  # query heads per key-value head

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


def plan_attention(
    query_start_loc: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    block_tables: Tensor,
    block_size: int,
    group_size: int,
) -> AttentionPlan:
    """Plan ``paged_attention`` for a step of R requests.

    query_start_loc: int32 [R + 1], seq_lens: int32 [R], on the host: request r has tokens query_start_loc[r] to
    query_start_loc[r + 1] at consecutive positions that end at seq_lens[r] - 1.
    block_tables: int32 [R, W] on the device; only their values are used there, never waited for.
    """
    return AttentionPlan(
        np.ascontiguousarray(query_start_loc, np.int32),
        np.ascontiguousarray(seq_lens, np.int32),
        block_tables.contiguous(),
        block_size,
        group_size,
    )
