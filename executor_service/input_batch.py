"""What one step runs on: tensors on the device, plus the host copies that planning needs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from executor_service.batch_dimensions import BatchDimensions


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters, one entry per sampled row (S rows, unpadded), in the order of ``sample_indices``."""

    temperature: Tensor  # float32 [S]; 0 = greedy
    top_k: Tensor  # int32 [S]; 0 = all
    top_p: Tensor  # float32 [S]; 1 = all
    seed: Tensor  # int64 [S]: bit pattern of the uint64 seed
    position: Tensor  # int64 [S]: absolute position (prompt and output) of the token being sampled
    # Host flags, so that nothing is computed that no row uses.
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool


@dataclass(frozen=True, slots=True)
class InputBatch:
    """One step: T padded tokens of R requests, of which S rows are sampled.

    The tokens of request r are ``query_start_loc[r]`` to ``query_start_loc[r + 1]``; their positions are consecutive
    and end at ``seq_lens[r] - 1``. Tokens after ``query_start_loc[R]`` are padding (``batch_dimensions.pad_tokens``).
    """

    dimensions: BatchDimensions
    input_ids: Tensor  # int64 [T]; padding 0
    positions: Tensor  # int64 [T]; padding 0
    slot_mapping: Tensor  # int64 [T]: block * block_size + offset; padding lies in the dummy block
    query_start_loc: Tensor  # int32 [R + 1]
    seq_lens: Tensor  # int32 [R]: KV length of each request after this step's tokens
    block_tables: Tensor  # int32 [R, W]; tails hold the dummy block's id, never -1
    sample_indices: Tensor  # int64 [S]: token index whose hidden state is sampled
    sampling: SamplingBatch
    # The same values on the host: attention metadata is planned from them without waiting for the device.
    host_query_start_loc: NDArray[np.int32]  # [R + 1]
    host_seq_lens: NDArray[np.int32]  # [R]
