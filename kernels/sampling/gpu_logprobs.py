"""Triton kernel of the sum behind log probabilities: one program per row, so that a row's sum has one shape.

Torch adds rows up in an order that depends on how many there are. The rest of ``composed.log_probabilities`` does not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import composed
from kernels.sampling.batch import Logprobs

_BLOCK = 4096


def log_probabilities(logits: Tensor, targets: Tensor, num_top: int) -> Logprobs:
    """See ``kernels.sampling.log_probabilities``."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    total = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _log_sum_exp[(rows,)](logits, total, vocab_size, BLOCK=_BLOCK, num_warps=8)
    return composed.normalised(logits, total, targets, num_top)


@triton.jit
def _log_sum_exp(logits, total, vocab_size, BLOCK: tl.constexpr):
    """Not finite for a row that has a NaN or an infinity, or nothing but -inf."""
    columns = tl.arange(0, BLOCK)
    logits += tl.program_id(0).to(tl.int64) * vocab_size
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    start = tl.full((), 0, tl.int32)
    while start < vocab_size:
        inside = start + columns < vocab_size
        highest = tl.maximum(highest, tl.load(logits + start + columns, mask=inside, other=float("-inf")))
        start += BLOCK
    peak = tl.max(highest, axis=0)
    weights = tl.zeros((BLOCK,), tl.float32)
    start = tl.full((), 0, tl.int32)
    while start < vocab_size:
        inside = start + columns < vocab_size
        values = tl.load(logits + start + columns, mask=inside, other=0.0)
        weights += tl.where(inside, tl.exp(values - peak), 0.0)
        start += BLOCK
    tl.store(total + tl.program_id(0), peak + tl.log(tl.sum(weights, axis=0)))
