"""The sampler's Triton kernels: logits are read where they lie, and nothing else of their size is written.

A row is cut into chunks of the vocabulary that are worked on side by side. ``_extremes`` finds each chunk's highest
logit, ``_draw`` each chunk's best sum of scaled logit and noise, and ``_choose`` the best of a row's chunks.

Processors (masks, biases, penalties) are in gpu_processors.py, filters in gpu_filters.py, log probabilities in
gpu_logprobs.py. Arguments that steps differ in are values, not variants of a kernel: none is compiled while requests
wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import composed, gpu_processors
from kernels.sampling.batch import LogprobRequest, Logprobs, Sampled, SamplingBatch
from kernels.sampling.gpu_draws import gumbel, noise_bits, order_keys, scaled
from kernels.sampling.gpu_filters import CANDIDATES, Chunks, least_values, row_highest
from kernels.sampling.gpu_logprobs import log_probabilities

_CHUNK = 4096


def sample(logits: Tensor, batch: SamplingBatch, chunk: int = _CHUNK, max_candidates: int = CANDIDATES) -> Sampled:
    """See ``kernels.sampling.sample``; ``chunk``, a power of two, and ``max_candidates`` change no bit."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    given = chunks = _extremes_of(logits, chunk, masked=False)
    processed = logits
    if batch.has_processors:
        processed = gpu_processors.process(logits, batch)
        chunks = _extremes_of(processed, chunk, masked=True)
    least = scores = drawn = None
    if not batch.all_greedy:
        least = least_values(processed, batch, chunks, max_candidates)
        scores, drawn = torch.empty_like(chunks.peaks), torch.empty_like(chunks.best)
        if rows:
            _draw[(rows, chunks.count)](
                processed,
                batch.temperature,
                batch.seed,
                batch.position,
                chunks.peaks,
                least,
                scores,
                drawn,
                vocab_size,
                chunks.count,
                **chunks.constants,
            )
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    row_ok = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows:
        _choose[(rows,)](
            given.peaks,
            chunks.peaks,
            chunks.best,
            scores,
            drawn,
            batch.temperature,
            token_ids,
            row_ok.view(torch.uint8),
            vocab_size,
            chunks.count,
            CHUNKS=triton.next_power_of_2(chunks.count),
            num_warps=1,
        )
    sampled = Sampled(token_ids, row_ok, None)
    if batch.logprobs is None:
        return sampled
    return Sampled(token_ids, row_ok, _report(logits, processed, sampled, chunks, least, batch, batch.logprobs))


def _extremes_of(logits: Tensor, size: int, *, masked: bool) -> Chunks:
    rows, vocab_size = logits.shape
    count = triton.cdiv(vocab_size, size)
    chunks = Chunks(
        size,
        count,
        torch.empty((rows, count), dtype=torch.float32, device=logits.device),
        torch.empty((rows, count), dtype=torch.int32, device=logits.device),
    )
    if rows:
        _extremes[(rows, count)](
            logits, chunks.peaks, chunks.best, vocab_size, count, MASKED=masked, BLOCK=size, num_warps=8
        )
    return chunks


def _report(
    logits: Tensor,
    processed: Tensor,
    sampled: Sampled,
    chunks: Chunks,
    least: Tensor | None,
    batch: SamplingBatch,
    request: LogprobRequest,
) -> Logprobs:
    """Slice by slice: only as many rows exist once more."""

    def distribution(at: slice) -> Tensor:
        rows = request.rows[at]
        out = torch.empty((rows.shape[0], logits.shape[1]), dtype=torch.float32, device=logits.device)
        if rows.shape[0]:
            _distribution[(rows.shape[0], chunks.count)](
                logits,
                processed,
                rows,
                request.processed[at].view(torch.uint8),
                sampled.row_ok.view(torch.uint8),
                batch.temperature,
                chunks.peaks,
                least,
                out,
                logits.shape[1],
                chunks.count,
                **chunks.constants,
            )
        return out

    targets = sampled.token_ids.index_select(0, request.rows)
    return composed.report(distribution, targets, request.num_top, log_probabilities)


@triton.jit
def _best_of(values, ids, row, chunks, CHUNKS: tl.constexpr):
    """(the highest of a row's chunks, the lowest id that has it, whether any is NaN)."""
    at = tl.arange(0, CHUNKS)
    inside = at < chunks
    found = tl.load(values + row * chunks + at, mask=inside, other=float("-inf"))
    spoiled = tl.max((~(found < float("inf"))).to(tl.int32), axis=0)
    highest = tl.max(found, axis=0)
    best = tl.load(ids + row * chunks + at, mask=inside & (found == highest), other=2147483647)
    return highest, tl.min(best, axis=0), spoiled


@triton.jit
def _extremes(logits, peaks, best, vocab_size, chunks, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab_size
    values = tl.load(logits + row * vocab_size + ids, mask=inside, other=float("-inf"))
    peak = tl.max(values, axis=0)
    # what a processor made impossible is -inf; nothing else may be anything but finite
    spoils = ~(values < float("inf"))
    if not MASKED:
        spoils = spoils | (values == float("-inf"))
    spoiled = tl.max((spoils & inside).to(tl.int32), axis=0)
    tl.store(best + row * chunks + chunk, tl.min(tl.where(inside & (values == peak), ids, vocab_size), axis=0))
    tl.store(peaks + row * chunks + chunk, tl.where(spoiled > 0, float("nan"), peak))


@triton.jit
def _kept(values, row, highest, heat, least):
    """Scaled logits; what the row's filters drop is -inf."""
    values = scaled(values, highest, heat)
    if least is not None:
        values = tl.where(order_keys(values) >= tl.load(least + row), values, float("-inf"))
    return values


@triton.jit
def _draw(
    logits,
    temperature,
    seed,
    position,
    peaks,
    least,
    scores,
    drawn,
    vocab_size,
    chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = ids < vocab_size
        values = tl.load(logits + row * vocab_size + ids, mask=inside, other=float("-inf"))
        values = _kept(values, row, row_highest(peaks, row, chunks, CHUNKS), heat, least)
        values += gumbel(noise_bits(tl.load(seed + row), tl.load(position + row), ids))
        values = tl.where(inside, values, float("-inf"))
        score = tl.max(values, axis=0)
        tl.store(drawn + row * chunks + chunk, tl.min(tl.where(inside & (values == score), ids, vocab_size), axis=0))
        tl.store(scores + row * chunks + chunk, score)


@triton.jit
def _choose(
    given_peaks,
    peaks,
    best,
    scores,
    drawn,
    temperature,
    token_ids,
    row_ok,
    vocab_size,
    chunks,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNKS)
    given = tl.load(given_peaks + row * chunks + at, mask=at < chunks, other=0.0)
    highest, token, spoiled = _best_of(peaks, best, row, chunks, CHUNKS)
    if scores is not None:  # noqa: SIM102  # this is the compiler's to decide, what follows the kernel's
        if tl.load(temperature + row) > 0.0:
            token = _best_of(scores, drawn, row, chunks, CHUNKS)[1]
    bad = (tl.max((~(given < float("inf"))).to(tl.int32), axis=0) | spoiled) > 0
    ok = (highest > float("-inf")) & (token < vocab_size) & (bad == 0)
    tl.store(token_ids + row, tl.where(ok, token, 0).to(tl.int64))
    tl.store(row_ok + row, ok.to(tl.uint8))


@triton.jit
def _distribution(
    logits,
    processed_logits,
    rows,
    processed,
    row_ok,
    temperature,
    peaks,
    least,
    out,
    vocab_size,
    chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The logits whose distribution a row reports: its own, or those sampled from; NaN for a row that failed."""
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab_size
    if tl.load(row_ok + row) == 0:
        values = tl.full((BLOCK,), float("nan"), tl.float32)
    elif tl.load(processed + line) == 0:
        values = tl.load(logits + row * vocab_size + ids, mask=inside, other=0.0)
    else:
        values = tl.load(processed_logits + row * vocab_size + ids, mask=inside, other=0.0)
        heat = tl.load(temperature + row)
        if heat > 0.0:
            values = _kept(values, row, row_highest(peaks, row, chunks, CHUNKS), heat, least)
    tl.store(out + line * vocab_size + ids, values, mask=inside)
