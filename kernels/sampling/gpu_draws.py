"""What the Triton kernels of gpu.py share: scaled logits, the noise, and the least value that filters keep.

Whatever is added up is added in integers: no bit depends on the order or on tiles.
"""

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_DIGITS = tl.constexpr(16)  # candidates for the next four bits of a threshold
LEVELS = tl.constexpr(16)
_ONE = tl.constexpr(float(1 << 40))  # weight of the most likely id: 2^23 of them fit into a sum


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
def gumbel(bits):
    """Standard Gumbel noise of the generator's bits."""
    uniform = ((bits >> 24).to(tl.int64).to(tl.float32) + 0.5) * (2.0**-40)
    uniform = tl.minimum(uniform, 1.0 - 2.0**-24)
    # -log(1 - u); where u is small, a logarithm of something near 1 would lose it
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1 / 3 + uniform * (0.25 + uniform * (0.2 + uniform / 6)))))
    exponential = tl.where(uniform < 0.05, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def scaled(values, highest, temperature):
    """Relative to the highest, and divided as torch divides: filters and draws see the same bits."""
    return tl.div_rn(values - highest, temperature)


@triton.jit
def order_keys(values):
    """Integers from 0 to 2^32 - 1 that order as the floats do; both zeros are one."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def level_bounds():
    """Scaled logits, exact in float32 and falling, that a threshold is compared with first; the last is -inf."""
    levels = tl.arange(0, LEVELS)
    squares = ((levels + 1) * (levels + 1)).to(tl.float32)
    return tl.where(levels == LEVELS - 1, float("-inf"), squares * -0.125)


@triton.jit
def weights_of(values, inside):
    """Probabilities relative to the highest, of scaled logits."""
    return tl.where(inside, (tl.exp(values) * _ONE).to(tl.int64), 0)


@triton.jit
def least_kept(logits, size, highest, temperature, floor, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The least key t, not below ``floor``, for which the weights of all keys above t add up to less than ``limit``.

    Keys are those of ``size`` scaled logits. Weights are 1 (COUNT), or ``weights_of`` them.
    """
    columns, digits = tl.arange(0, BLOCK), tl.arange(0, _DIGITS)
    found = tl.full((), 0, tl.int64)
    for step in range(8):
        shift = 28 - 4 * step
        # the highest key of each digit: what lies above it is above every key that begins so
        bounds = found + ((digits.to(tl.int64) + 1) << shift) - 1
        above = tl.zeros((_DIGITS,), tl.int64)
        start = tl.full((), 0, tl.int64)
        while start < size:
            inside = start + columns < size
            values = scaled(tl.load(logits + start + columns, mask=inside, other=0.0), highest, temperature)
            keys = order_keys(values)
            counted = inside & (keys >= floor)
            weights = counted.to(tl.int64) if COUNT else weights_of(values, counted)
            above += tl.sum(tl.where(keys[:, None] > bounds[None, :], weights[:, None], 0), axis=0)
            start += BLOCK
        found += tl.min(tl.where(above < limit, digits, _DIGITS - 1), axis=0).to(tl.int64) << shift
    return tl.maximum(found, floor)


@triton.jit
def mass(logits, size, highest, temperature, floor, BLOCK: tl.constexpr):
    """What the weights of all keys from ``floor`` on add up to."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    start = tl.full((), 0, tl.int64)
    while start < size:
        inside = start + columns < size
        values = scaled(tl.load(logits + start + columns, mask=inside, other=0.0), highest, temperature)
        total += weights_of(values, inside & (order_keys(values) >= floor))
        start += BLOCK
    return tl.sum(total, axis=0)
