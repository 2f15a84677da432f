"""How large a step is, and to how many rows it is padded before it runs."""

from dataclasses import dataclass

import torch

from kernels.native.library import handles_dtype


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
