"""Logits processors as Triton kernels: masks, biases and penalties, each for the rows that ask for it.

They give the bits of ``composed.process``: counts are integers, no id is biased twice, and products are rounded before
they are subtracted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.batch import Penalties, SamplingBatch, TokenBias, TokenMask

_BLOCK = 1024
_SLICE = 64  # penalised rows whose counts, each [rows, V], exist at once
_IN_PROMPT = tl.constexpr(1 << 30)  # beside the number of times that an id occurs in the output


def process(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """See ``composed.process``; ``logits`` are contiguous."""
    logits = logits.clone()
    if batch.mask is not None:
        _apply_mask(logits, batch.mask)
    if batch.bias is not None:
        _apply_bias(logits, batch.bias)
    if batch.penalties is not None:
        for first in range(0, batch.penalties.rows.shape[0], _SLICE):
            _apply_penalties(logits, batch.penalties, slice(first, first + _SLICE), batch.position)
    return logits


def _apply_mask(logits: Tensor, mask: TokenMask) -> None:
    vocab_size = logits.shape[1]
    _forbid[(mask.rows.shape[0], triton.cdiv(vocab_size, _BLOCK))](
        logits, mask.rows, mask.bits, vocab_size, mask.bits.stride(0), BLOCK=_BLOCK
    )


def _apply_bias(logits: Tensor, bias: TokenBias) -> None:
    rows, width = bias.token_ids.shape
    _add_bias[(rows, triton.cdiv(width, _BLOCK))](
        logits,
        bias.rows,
        bias.token_ids,
        bias.values,
        logits.shape[1],
        bias.token_ids.stride(0),
        bias.values.stride(0),
        width,
        BLOCK=_BLOCK,
    )


def _apply_penalties(logits: Tensor, penalties: Penalties, span: slice, position: Tensor) -> None:
    rows, vocab_size = penalties.rows[span], logits.shape[1]
    counts = torch.zeros((rows.shape[0], vocab_size), dtype=torch.int32, device=logits.device)
    _count[(rows.shape[0], triton.cdiv(penalties.log.shape[1], _BLOCK))](
        penalties.log,
        penalties.log_rows[span],
        rows,
        position,
        penalties.prompt_lens[span],
        counts,
        penalties.log.stride(0),
        vocab_size,
        BLOCK=_BLOCK,
    )
    _penalise[(rows.shape[0], triton.cdiv(vocab_size, _BLOCK))](
        logits,
        rows,
        penalties.repetition[span],
        penalties.frequency[span],
        penalties.presence[span],
        counts,
        vocab_size,
        BLOCK=_BLOCK,
        enable_fp_fusion=False,
    )


@triton.jit
def _forbid(logits, rows, bits, vocab_size, words, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab_size
    word = tl.load(bits + line * words + ids // 32, mask=inside, other=0)
    forbidden = inside & (((word >> (ids % 32)) & 1) == 0)
    tl.store(logits + tl.load(rows + line) * vocab_size + ids, float("-inf"), mask=forbidden)


@triton.jit(do_not_specialize=["width"])
def _add_bias(logits, rows, token_ids, values, vocab_size, id_stride, value_stride, width, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    ids = tl.load(token_ids + line * id_stride + at, mask=inside, other=0)
    added = tl.load(values + line * value_stride + at, mask=inside, other=0.0)
    used = inside & (added != 0.0)  # what fills up names an id that may be biased, too
    target = logits + tl.load(rows + line) * vocab_size + ids
    tl.store(target, tl.load(target, mask=used, other=0.0) + added, mask=used)


@triton.jit
def _count(log, log_rows, rows, position, prompt_lens, counts, log_stride, vocab_size, BLOCK: tl.constexpr):
    """How often each id occurs in the output before the row's position, and whether it occurs in the prompt."""
    line = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_past = at < tl.load(position + tl.load(rows + line))
    is_prompt = at < tl.load(prompt_lens + line)
    ids = tl.load(log + tl.load(log_rows + line) * log_stride + at, mask=is_past, other=0)
    target = counts + line * vocab_size + ids
    tl.atomic_or(target, _IN_PROMPT, mask=is_past & is_prompt, sem="relaxed")
    tl.atomic_add(target, 1, mask=is_past & ~is_prompt, sem="relaxed")


@triton.jit
def _penalise(logits, rows, repetition, frequency, presence, counts, vocab_size, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(counts + line * vocab_size + ids, mask=ids < vocab_size, other=0)
    target = logits + tl.load(rows + line) * vocab_size + ids
    values = tl.load(target, mask=found != 0, other=0.0)
    factor = tl.load(repetition + line)
    values = tl.where(values > 0.0, tl.div_rn(values, factor), values * factor)
    times = found & (_IN_PROMPT - 1)
    values -= tl.load(frequency + line) * times.to(tl.float32)
    values -= tl.where(times > 0, tl.load(presence + line), 0.0)
    tl.store(target, values, mask=found != 0)
