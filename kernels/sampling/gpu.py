"""Triton kernels of sampling. Whatever is added up is added in integers: no bit depends on the order or on tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_DIGITS = tl.constexpr(16)  # candidates for the next four bits of a threshold
_ONE = tl.constexpr(float(1 << 40))  # weight of the most likely id: 2^23 of them fit into a sum


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int, block: int = _BLOCK) -> Tensor:
    """See ``kernels.sampling.gumbel_noise``."""
    rows = seed.shape[0]
    out = torch.empty((rows, vocab_size), dtype=torch.float32, device=seed.device)
    if rows:
        grid = (rows, triton.cdiv(vocab_size, block))
        _gumbel_noise[grid](seed.contiguous(), position.contiguous(), out, vocab_size, BLOCK=block)
    return out


def mask_top_k_top_p(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None, block: int = _BLOCK) -> Tensor:
    """See ``kernels.sampling.mask_top_k_top_p``: one program per row finds its least value kept, four bits a pass."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    out = torch.empty_like(logits)
    if rows:
        _mask_top_k_top_p[(rows,)](
            logits,
            None if top_k is None else top_k.contiguous(),
            None if top_p is None else top_p.contiguous(),
            out,
            SIZE=vocab_size,
            BY_COUNT=top_k is not None,
            BY_MASS=top_p is not None,
            BLOCK=block,
            num_warps=8,
        )
    return out


@triton.jit
def _mix(z):
    """SplitMix64's finaliser."""
    z = (z ^ (z >> 30)) * tl.full((), _MIX_1, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), _MIX_2, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def noise_bits(seed, position, ids):
    """The documented generator's 64 bits for each of ``ids``; seed and position are int64 scalars."""
    golden = tl.full((), _GOLDEN, tl.uint64)
    key = _mix(_mix(seed.to(tl.uint64, bitcast=True)) + golden * (position + 1).to(tl.uint64))
    return _mix(key + golden * (ids + 1).to(tl.uint64))


@triton.jit
def _gumbel_noise(seed, position, out, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = noise_bits(tl.load(seed + row), tl.load(position + row), ids)
    uniform = ((bits >> 24).to(tl.int64).to(tl.float32) + 0.5) * (2.0**-40)
    uniform = tl.minimum(uniform, 1.0 - 2.0**-24)
    # -log(1 - u); where u is small, a logarithm of something near 1 would lose it
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1 / 3 + uniform * (0.25 + uniform * (0.2 + uniform / 6)))))
    exponential = tl.where(uniform < 0.05, series, -tl.log(1.0 - uniform))
    tl.store(out + row * vocab_size + ids, -tl.log(exponential), mask=ids < vocab_size)


@triton.jit
def _keys(values):
    """Integers from 0 to 2^32 - 1 that order as the floats do; both zeros are one."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _weights(values, highest, inside, COUNT: tl.constexpr):
    if COUNT:
        return inside.to(tl.int64)
    return tl.where(inside, (tl.exp(values - highest) * _ONE).to(tl.int64), 0)


@triton.jit
def _least_kept(row, SIZE: tl.constexpr, highest, floor, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The least key t, not below ``floor``, for which the weights of all keys above t add up to less than ``limit``."""
    columns, digits = tl.arange(0, BLOCK), tl.arange(0, _DIGITS)
    found = tl.full((), 0, tl.int64)
    for step in range(8):
        shift = 28 - 4 * step
        # the highest key of each digit: what lies above it is above every key that begins so
        bounds = found + ((digits.to(tl.int64) + 1) << shift) - 1
        above = tl.zeros((_DIGITS,), tl.int64)
        for start in range(0, SIZE, BLOCK):
            inside = start + columns < SIZE
            values = tl.load(row + start + columns, mask=inside, other=0.0)
            keys = _keys(values)
            weights = _weights(values, highest, inside & (keys >= floor), COUNT)
            above += tl.sum(tl.where(keys[:, None] > bounds[None, :], weights[:, None], 0), axis=0)
        found += tl.min(tl.where(above < limit, digits, _DIGITS - 1), axis=0).to(tl.int64) << shift
    return tl.maximum(found, floor)


@triton.jit
def _mass(row, SIZE: tl.constexpr, highest, floor, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, SIZE, BLOCK):
        inside = start + columns < SIZE
        values = tl.load(row + start + columns, mask=inside, other=0.0)
        total += _weights(values, highest, inside & (_keys(values) >= floor), False)
    return tl.sum(total, axis=0)


@triton.jit
def _mask_top_k_top_p(
    logits, top_k, top_p, out, SIZE: tl.constexpr, BY_COUNT: tl.constexpr, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * SIZE
    columns = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, SIZE, BLOCK):
        peaks = tl.maximum(peaks, tl.load(logits + start + columns, mask=start + columns < SIZE, other=float("-inf")))
    highest = tl.max(peaks, axis=0)
    least = tl.full((), 0, tl.int64)
    if BY_COUNT:
        count = tl.load(top_k + row).to(tl.int64)
        if count > 0:
            least = _least_kept(logits, SIZE, highest, least, count, True, BLOCK)
    if BY_MASS:
        share = tl.load(top_p + row)
        if share < 1.0:
            # at least one unit, so that the most likely id stays whatever rounding does
            limit = (_mass(logits, SIZE, highest, least, BLOCK).to(tl.float64) * share).to(tl.int64)
            least = _least_kept(logits, SIZE, highest, least, tl.maximum(limit, 1), False, BLOCK)
    for start in range(0, SIZE, BLOCK):
        inside = start + columns < SIZE
        values = tl.load(logits + start + columns, mask=inside, other=0.0)
        kept = tl.where(_keys(values) >= least, values, float("-inf"))
        tl.store(out + row * SIZE + start + columns, kept, mask=inside)
