"""What one step runs on: tensors on the device, plus the host copies that planning needs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from executor_service.batch_dimensions import BatchDimensions
from executor_service.masks import Masks
from kernels.sampling import SamplingBatch


@dataclass(frozen=True, slots=True)
class GrammarMasks:
    """Masks that matchers make while the step runs; they narrow rows ``at`` of ``SamplingBatch.mask.bits``."""

    source: Masks
    at: Tensor  # int64 [len(source.rows)]


@dataclass(frozen=True, slots=True)
class PromptTargets:
    """N prompt tokens whose log probabilities the step computes."""

    indices: Tensor  # int64 [N]: token index whose hidden state predicts the token
    token_ids: Tensor  # int64 [N]
    num_top: int


@dataclass(frozen=True, slots=True)
class Audit:
    """A tokens of the log to sample again, few enough for one product with the language model head."""

    indices: Tensor  # int64 [A]: token index whose hidden state precedes the token
    expected: Tensor  # int64 [A]: what the log has
    sampling: SamplingBatch
    grammar: GrammarMasks | None = None


@dataclass(frozen=True, slots=True)
class LogAppend:
    """Where sampled tokens go in the logs of the P rows with penalties."""

    sampled: Tensor  # int64 [P], indices into the sampled rows
    rows: Tensor  # int64 [P]
    positions: Tensor  # int64 [P]


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
    grammar: GrammarMasks | None = None
    prompt_targets: PromptTargets | None = None
    audits: tuple[Audit, ...] = ()
