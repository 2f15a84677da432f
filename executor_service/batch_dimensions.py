"""How large a step is, to how many rows it is padded before it runs, and which sizes are worth a CUDA graph."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kernels.native.library import handles_dtype

_MIXED_ROUNDER = 8


@dataclass(frozen=True, slots=True, order=True)
class BatchDimensions:
    """The real size of one step, ordered by (tokens, prefill requests, decode requests). Padding is not counted."""

    tokens: int
    prefill_requests: int
    decode_requests: int

    @property
    def requests(self) -> int:
        """Requests of the step, prefill and decode."""
        return self.prefill_requests + self.decode_requests

    def covers(self, step: "BatchDimensions") -> bool:
        """Whether ``step`` can be padded to this size. A place for a prefill may take a decode, but not the other way,
        and a step of decodes alone is only covered by a size of decodes alone: other kernels run it.
        """
        if self.tokens < step.tokens or self.requests < step.requests:
            return False
        if step.prefill_requests == 0:
            return self.prefill_requests == 0
        return self.prefill_requests >= step.prefill_requests


def smallest_cover(sizes: Iterable[BatchDimensions], step: BatchDimensions) -> BatchDimensions | None:
    """The smallest of ``sizes`` that covers ``step``; None where none does."""
    return min((size for size in sizes if size.covers(step)), default=None)


def decode_sizes(max_rows: int) -> list[BatchDimensions]:
    """Sizes of steps of decodes alone: 1, 2, 4, 8, multiples of 16, and ``max_rows``, so that every step is covered."""
    counts = {count for count in (1, 2, 4, 8, *range(16, max_rows + 1, 16)) if count < max_rows} | {max_rows}
    return [BatchDimensions(count, 0, count) for count in sorted(counts)]


def mixed_sizes(max_tokens: int, max_rows: int, count: int) -> list[BatchDimensions]:
    """``count`` evenly spaced sizes of up to ``max_tokens`` tokens, multiples of 8, for steps with prefills.

    All places are for prefills, which may take decodes too.
    """
    step = pad_tokens(-(-max_tokens // count), _MIXED_ROUNDER)
    tokens = {min(size, max_tokens) for size in range(step, max_tokens + step, step)}
    return [BatchDimensions(size, min(size, max_rows), 0) for size in sorted(tokens)]


def pad_tokens(count: int, rounder: int) -> int:
    """``count`` rounded up to a multiple of ``rounder``.

    A batch builder pads ``input_ids``, ``positions`` and ``slot_mapping`` to
    ``pad_tokens(num_tokens, token_rounder(device, dtype, torch.get_num_threads()))`` entries. Sampled rows stay
    unpadded there: the model runner pads what it gives to the language model head.
    """
    return -(-count // rounder) * rounder


def token_rounder(device: torch.device, dtype: torch.dtype, num_threads: int) -> int:
    """The multiple to which rows of matrix products are padded so that no row's bits depend on how many there are.

    On CPU, ``F.linear`` runs other code for a remainder of fewer than four rows per thread in float32 (MKL: with two
    threads M = 1-3, 5-7 and 9-11 differ in the last bit), and for a single row in bfloat16 and float16 (oneDNN, some
    shapes). Measured with 1 and 2 threads on AVX512; ``tests/executor/test_invariance.py`` checks it. Native kernels
    need no padding: their rows never depend on each other. Other devices give no such promise at any padding.
    """
    if device.type != "cpu" or handles_dtype(device, dtype):
        return 1
    return 4 * num_threads if dtype == torch.float32 else 4
