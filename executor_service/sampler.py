"""Turns logits into tokens: greedy, or sampling with temperature, top-k and top-p."""

import torch
from torch import Tensor

from executor_service.input_batch import SamplingBatch
from kernels.sampling import gumbel_noise, mask_top_k_top_p


def sample(logits: Tensor, sampling: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Sample one token per row: (token ids int64 [S], row_ok bool [S]).

    logits: float32 [S, V]. A row that holds NaN or an infinity has row_ok False and token 0. Greedy rows take the most
    likely id, the lowest of equals. Other rows divide by the temperature, keep the top k, then the nucleus of mass p
    (``mask_top_k_top_p``), and sample by Gumbel-max with noise that is a pure function of (seed, position, id): a row's
    token depends on its own logits and parameters only.
    """
    lowest, highest = torch.aminmax(logits, dim=-1)
    row_ok = torch.isfinite(lowest) & torch.isfinite(highest)
    token_ids = logits.argmax(-1)
    if not sampling.all_greedy:
        token_ids = torch.where(sampling.temperature > 0, _sample_noisy(logits, highest, sampling), token_ids)
    return torch.where(row_ok, token_ids, 0), row_ok


def _sample_noisy(logits: Tensor, highest: Tensor, sampling: SamplingBatch) -> Tensor:
    """Gumbel-max over scaled and filtered logits; the result means nothing for greedy rows."""
    temperature = torch.where(sampling.temperature > 0, sampling.temperature, 1.0).unsqueeze(1)
    # Relative to the highest, so that no temperature, however small, makes an infinity out of the best logit.
    scaled = (logits - highest.unsqueeze(1)) / temperature
    if sampling.any_top_k or sampling.any_top_p:
        scaled = _filter(scaled, sampling)
    return scaled.add_(gumbel_noise(sampling.seed, sampling.position, logits.shape[1])).argmax(-1)


def _filter(scaled: Tensor, sampling: SamplingBatch) -> Tensor:
    """Apply top-k and top-p to the rows that ask for them."""
    top_k = sampling.top_k if sampling.any_top_k else None
    top_p = sampling.top_p if sampling.any_top_p else None
    if scaled.device.type != "cpu":
        return mask_top_k_top_p(scaled, top_k, top_p)
    # Sorting a vocabulary is the dearest part of sampling on CPU, and selecting rows needs no wait for a device there.
    rows = torch.nonzero((sampling.temperature > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1.0))).squeeze(1)
    scaled[rows] = mask_top_k_top_p(
        scaled[rows], None if top_k is None else top_k[rows], None if top_p is None else top_p[rows]
    )
    return scaled
