"""Filters of the Triton sampler: the least value that top-k, top-p and min_p keep of each row.

Filters keep what is not below a threshold, which ``_thresholds`` searches for in one program per row. So that it need
not walk through the vocabulary many times, ``_levels`` counts what lies above each of a few levels, and ``_gather``
puts aside what lies above the first one that must be below the threshold.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.batch import SamplingBatch
from kernels.sampling.gpu_draws import LEVELS, least_kept, level_bounds, mass, order_keys, scaled, weights_of

CANDIDATES = 32_768  # put aside at most; a row with more searches all of its logits

_BLOCK = 1024  # of what is compared with all levels at a time


@dataclass(frozen=True, slots=True)
class Chunks:
    """How rows are cut, and what is known of each chunk of the logits that are sampled from."""

    size: int
    count: int
    peaks: Tensor  # float32 [S, count]: the highest logit; NaN where one spoils the row
    best: Tensor  # int32 [S, count]: the lowest id that has it

    @property
    def constants(self) -> dict[str, int]:
        """Of all kernels that work on chunks."""
        return {"BLOCK": self.size, "CHUNKS": triton.next_power_of_2(self.count), "num_warps": 8}


def least_values(logits: Tensor, batch: SamplingBatch, chunks: Chunks, max_candidates: int) -> Tensor | None:
    """int64 [S]: the key of the least scaled logit that each row's filters keep; None where no row has any."""
    if not batch.any_top_k and not batch.any_top_p and batch.min_p is None:
        return None
    rows, vocab_size = logits.shape
    device, levels = logits.device, LEVELS.value
    least = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return least
    counts = torch.empty((rows, chunks.count, levels), dtype=torch.int32, device=device)
    masses = torch.empty((rows, chunks.count, levels), dtype=torch.int64, device=device)
    sizes, totals = torch.empty_like(least), torch.empty_like(least)
    candidates = torch.empty((rows, max_candidates), dtype=torch.float32, device=device)
    shared = (logits, batch.temperature, batch.top_k, batch.top_p, chunks.peaks)
    constants = {**chunks.constants, "STEP": min(_BLOCK, chunks.size)}
    _levels[(rows, chunks.count)](
        logits, batch.temperature, chunks.peaks, counts, masses, vocab_size, chunks.count, **constants
    )
    _gather[(rows, chunks.count)](
        *shared, counts, masses, sizes, totals, candidates, vocab_size, chunks.count, max_candidates, **constants
    )
    _thresholds[(rows,)](
        *shared,
        None if batch.min_p is None else batch.min_p.log(),
        sizes,
        totals,
        candidates,
        least,
        vocab_size,
        chunks.count,
        max_candidates,
        BLOCK=_BLOCK,
        CHUNKS=triton.next_power_of_2(chunks.count),
        num_warps=8,
    )
    return least


@triton.jit
def row_highest(peaks, row, chunks, CHUNKS: tl.constexpr):
    at = tl.arange(0, CHUNKS)
    return tl.max(tl.load(peaks + row * chunks + at, mask=at < chunks, other=float("-inf")), axis=0)


@triton.jit
def _levels(
    logits,
    temperature,
    peaks,
    counts,
    masses,
    vocab_size,
    chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEP: tl.constexpr,
):
    """How many of a chunk's ids lie above each level, and what they weigh."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        highest = row_highest(peaks, row, chunks, CHUNKS)
        bounds = level_bounds()
        count = tl.zeros((LEVELS,), tl.int32)
        weight = tl.zeros((LEVELS,), tl.int64)
        for start in range(0, BLOCK, STEP):
            ids = chunk * BLOCK + start + tl.arange(0, STEP)
            inside = ids < vocab_size
            values = scaled(tl.load(logits + row * vocab_size + ids, mask=inside, other=0.0), highest, heat)
            above = inside[:, None] & (values[:, None] >= bounds[None, :])
            count += tl.sum(above.to(tl.int32), axis=0)
            weight += tl.sum(tl.where(above, weights_of(values, inside)[:, None], 0), axis=0)
        target = (row * chunks + chunk) * LEVELS + tl.arange(0, LEVELS)
        tl.store(counts + target, count)
        tl.store(masses + target, weight)


@triton.jit
def _mass_limit(total, share):
    """At least one unit, so that the most likely id stays whatever rounding does."""
    return tl.maximum((total.to(tl.float64) * share).to(tl.int64), 1)


@triton.jit
def _gather(
    logits,
    temperature,
    top_k,
    top_p,
    peaks,
    counts,
    masses,
    sizes,
    totals,
    candidates,
    vocab_size,
    chunks,
    max_candidates,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Put a chunk's scaled logits above the row's level aside, one chunk's after another's."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        at, levels = tl.arange(0, CHUNKS), tl.arange(0, LEVELS)
        place = (row * chunks + at)[:, None] * LEVELS + levels[None, :]
        known = (at < chunks)[:, None]
        counted = tl.load(counts + place, mask=known, other=0)
        weighed = tl.sum(tl.load(masses + place, mask=known, other=0), axis=0)
        total = tl.max(weighed, axis=0)
        wanted = tl.load(top_k + row)
        if wanted > 0:  # what top-p keeps is among what top-k does
            reached = tl.sum(counted, axis=0) >= wanted
        else:
            reached = weighed >= _mass_limit(total, tl.load(top_p + row))
        level = tl.min(tl.where(reached, levels, LEVELS - 1), axis=0)
        above = tl.sum(tl.where(levels[None, :] == level, counted, 0), axis=1)
        size = tl.sum(above, axis=0)
        if chunk == 0:
            tl.store(sizes + row, size.to(tl.int64))
            tl.store(totals + row, total)
        if size <= max_candidates:
            highest = row_highest(peaks, row, chunks, CHUNKS)
            bound = tl.max(tl.where(levels == level, level_bounds(), float("-inf")), axis=0)
            first = tl.sum(tl.where(at < chunk, above, 0), axis=0)
            for start in range(0, BLOCK, STEP):
                ids = chunk * BLOCK + start + tl.arange(0, STEP)
                inside = ids < vocab_size
                values = scaled(tl.load(logits + row * vocab_size + ids, mask=inside, other=0.0), highest, heat)
                chosen = inside & (values >= bound)
                order = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
                tl.store(candidates + row * max_candidates + first + order, values, mask=chosen)
                first += tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def _thresholds(
    logits,
    temperature,
    top_k,
    top_p,
    peaks,
    log_min_p,
    sizes,
    totals,
    candidates,
    least,
    vocab_size,
    chunks,
    max_candidates,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        size = tl.load(sizes + row)
        if size <= max_candidates:  # which are scaled already
            searched = candidates + row * max_candidates
            highest = tl.full((), 0.0, tl.float32)
            divisor = tl.full((), 1.0, tl.float32)
        else:
            searched = logits + row * vocab_size
            highest = row_highest(peaks, row, chunks, CHUNKS)
            divisor = heat
            size = tl.full((), 0, tl.int64) + vocab_size
        found = tl.full((), 0, tl.int64)
        total = tl.load(totals + row)
        count = tl.load(top_k + row).to(tl.int64)
        if count > 0:
            found = least_kept(searched, size, highest, divisor, found, count, True, BLOCK)
            total = mass(searched, size, highest, divisor, found, BLOCK)
        share = tl.load(top_p + row)
        if share < 1.0:
            limit = _mass_limit(total, share)
            found = least_kept(searched, size, highest, divisor, found, limit, False, BLOCK)
        if log_min_p is not None:
            found = tl.maximum(found, order_keys(tl.load(log_min_p + row)))
        tl.store(least + row, found)
