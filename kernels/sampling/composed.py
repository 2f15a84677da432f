"""The sampler composed of torch operations and ``primitives``: where no fused kernel runs, and the oracle of those.

See ``kernels.sampling.sample`` for the definition. Nothing here waits for a value of the device. Processors and log
probabilities work on a few rows at a time: their temporaries are several times that.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.sampling.batch import LogprobRequest, Logprobs, Penalties, Sampled, SamplingBatch, TokenBias
from kernels.sampling.primitives import gumbel_noise, mask_top_k_top_p

_SLICE = 64  # rows whose temporaries, each [rows, V], exist at once


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """See ``kernels.sampling.sample``."""
    lowest, highest = torch.aminmax(logits, dim=-1)
    row_ok = torch.isfinite(lowest) & torch.isfinite(highest)
    processed = logits
    if batch.has_processors:
        processed = process(logits, batch)
        highest = processed.amax(-1)
        row_ok &= torch.isfinite(highest)
    token_ids = processed.argmax(-1)
    filtered = processed
    if not batch.all_greedy:
        drawn = batch.temperature > 0
        filtered = torch.where(drawn.unsqueeze(1), _filter(_scale(processed, highest, batch), batch), processed)
        noise = gumbel_noise(batch.seed, batch.position, logits.shape[1])
        token_ids = torch.where(drawn, (filtered + noise).argmax(-1), token_ids)
    token_ids = torch.where(row_ok, token_ids, 0)
    logprobs = None
    if batch.logprobs is not None:
        logprobs = _report(logits, filtered, token_ids, row_ok, batch.logprobs)
    return Sampled(token_ids, row_ok, logprobs)


def report(
    distribution: Callable[[slice], Tensor],
    targets: Tensor,
    num_top: int,
    measure: Callable[[Tensor, Tensor, int], Logprobs],
) -> Logprobs:
    """Log probabilities of ``targets``, int64 [N], by ``measure``, a ``log_probabilities``; ``distribution`` gives
    float32 logits [n, V] of n of the N rows.

    NaN in a row marks it as one that failed.
    """
    count = targets.shape[0]
    spans = [slice(first, min(first + _SLICE, count)) for first in range(0, max(count, 1), _SLICE)]
    parts = [measure(distribution(span), targets[span], num_top) for span in spans]
    if len(parts) == 1:
        return parts[0]
    return Logprobs(
        logprobs=torch.cat([part.logprobs for part in parts]),
        ranks=torch.cat([part.ranks for part in parts]),
        top_ids=torch.cat([part.top_ids for part in parts]),
        top_logprobs=torch.cat([part.top_logprobs for part in parts]),
    )


def log_probabilities(logits: Tensor, targets: Tensor, num_top: int) -> Logprobs:
    """See ``kernels.sampling.log_probabilities``."""
    return normalised(logits, logits.logsumexp(-1), targets, num_top)


def normalised(logits: Tensor, total: Tensor, targets: Tensor, num_top: int) -> Logprobs:
    """``log_probabilities``, with the logarithm of each row's sum of exponentials at hand: float32 [N]."""
    vocab_size = logits.shape[1]
    row_ok = torch.isfinite(total)
    own = logits.gather(1, targets.unsqueeze(1))
    ranks = (logits > own).sum(-1) + 1
    # One integer per id that orders by value, then by the lowest id: topk alone leaves open which of equals come first.
    bits = (logits + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) << 32
    order -= torch.arange(vocab_size, device=logits.device)
    top_ids = order.topk(min(num_top, vocab_size), dim=-1).indices
    top_logprobs = logits.gather(1, top_ids) - total.unsqueeze(1)
    top_logprobs = torch.where(row_ok.unsqueeze(1), top_logprobs, -torch.inf)
    missing = num_top - top_ids.shape[1]
    return Logprobs(
        logprobs=torch.where(row_ok, own.squeeze(1) - total, torch.nan),
        ranks=torch.where(row_ok, ranks, 0).int(),
        top_ids=torch.nn.functional.pad(top_ids, (0, missing)).int(),
        top_logprobs=torch.nn.functional.pad(top_logprobs, (0, missing), value=-torch.inf),
    )


def _report(logits: Tensor, filtered: Tensor, token_ids: Tensor, row_ok: Tensor, request: LogprobRequest) -> Logprobs:
    def distribution(span: slice) -> Tensor:
        rows, processed = request.rows[span], request.processed[span].unsqueeze(1)
        chosen = torch.where(processed, filtered.index_select(0, rows), logits.index_select(0, rows))
        # a row whose processors spoiled it is not reported by its own logits either
        return chosen.masked_fill_(~row_ok.index_select(0, rows).unsqueeze(1), torch.nan)

    return report(distribution, token_ids.index_select(0, request.rows), request.num_top, log_probabilities)


def process(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """A copy of the logits after their processors."""
    logits = logits.clone()
    if batch.mask is not None:
        for rows, bits in zip(torch.split(batch.mask.rows, _SLICE), torch.split(batch.mask.bits, _SLICE), strict=True):
            _mask(logits, rows, bits)
    if batch.bias is not None:
        _add_bias(logits, batch.bias)
    if batch.penalties is not None:
        for first in range(0, batch.penalties.rows.shape[0], _SLICE):
            _penalise(logits, batch.penalties, slice(first, first + _SLICE), batch.position)
    return logits


def _mask(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    every = bits.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=logits.device)
    forbidden = (every & 1).flatten(1)[:, : logits.shape[1]] == 0
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(forbidden, -torch.inf))


def _add_bias(logits: Tensor, bias: TokenBias) -> None:
    index = (bias.rows.unsqueeze(1).expand_as(bias.token_ids), bias.token_ids.long())
    logits.index_put_(index, bias.values, accumulate=True)


def _penalise(logits: Tensor, penalties: Penalties, span: slice, position: Tensor) -> None:
    rows = penalties.rows[span]
    history = penalties.log.index_select(0, penalties.log_rows[span]).long()
    at = torch.arange(history.shape[1], device=logits.device)
    is_past = at < position.index_select(0, rows).unsqueeze(1)
    is_output = is_past & (at >= penalties.prompt_lens[span].unsqueeze(1))
    values = logits.index_select(0, rows)
    seen = _count(history, is_past, values.shape[1]) > 0
    repetition = penalties.repetition[span].unsqueeze(1)
    values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
    output_counts = _count(history, is_output, values.shape[1])
    values -= penalties.frequency[span].unsqueeze(1) * output_counts
    values -= penalties.presence[span].unsqueeze(1) * (output_counts > 0)
    logits.index_copy_(0, rows, values)


def _count(history: Tensor, counted: Tensor, vocab_size: int) -> Tensor:
    """How often each id occurs where ``counted``: float32 [P, V], exact up to 2^24."""
    counts = torch.zeros(history.shape[0], vocab_size, dtype=torch.float32, device=history.device)
    return counts.scatter_add_(1, history.where(counted, 0), counted.float())


def _scale(logits: Tensor, highest: Tensor, batch: SamplingBatch) -> Tensor:
    """Relative to the highest, so that no temperature, however small, makes an infinity out of the best logit."""
    temperature = torch.where(batch.temperature > 0, batch.temperature, 1.0).unsqueeze(1)
    return (logits - highest.unsqueeze(1)) / temperature


def _filter(scaled: Tensor, batch: SamplingBatch) -> Tensor:
    if batch.any_top_k or batch.any_top_p:
        top_k = batch.top_k if batch.any_top_k else None
        scaled = mask_top_k_top_p(scaled, top_k, batch.top_p if batch.any_top_p else None)
    if batch.min_p is not None:
        scaled = scaled.masked_fill(scaled < batch.min_p.log().unsqueeze(1), -torch.inf)
    return scaled
