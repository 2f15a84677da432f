"""The sampler: from logits to tokens and their log probabilities."""

from torch import Tensor

from kernels.gpu import library as gpu_library
from kernels.native.library import available
from kernels.sampling import composed, native
from kernels.sampling.batch import (
    LogprobRequest,
    Logprobs,
    Penalties,
    Sampled,
    SamplingBatch,
    TokenBias,
    TokenMask,
)
from kernels.sampling.primitives import gumbel_noise, mask_top_k_top_p

__all__ = [
    "LogprobRequest",
    "Logprobs",
    "Penalties",
    "Sampled",
    "SamplingBatch",
    "TokenBias",
    "TokenMask",
    "gumbel_noise",
    "log_probabilities",
    "mask_top_k_top_p",
    "sample",
]


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """Sample one token per row of ``logits``, float32 [S, V], which is not changed.

    In this order: ids whose mask bit is 0 become impossible; the bias is added; logits of tokens seen in prompt or
    output are divided (positive) or multiplied (negative) by the repetition penalty (Keskar et al. 2019), those of
    tokens seen in the output lose the frequency penalty times their count, then the presence penalty. A greedy row
    takes the most likely id of what results, the lowest of equals. Other rows divide by the temperature, keep the top
    k, of these the nucleus of mass p (``mask_top_k_top_p``), of these the ids at least ``min_p`` times as likely as the
    most likely one (Nguyen et al. 2024), and sample by Gumbel-max (``gumbel_noise``).

    A row with a NaN or an infinity in its logits, or with nothing left to sample, has row_ok False. A row's token and
    log probabilities depend on its own logits, parameters and log only. Log probabilities are of softmax(logits), or,
    ``processed``, of the distribution sampled from: the ids kept; for greedy rows of what the processors left.
    """
    if logits.is_cpu and available():
        return native.sample(logits, batch)
    if gpu_library.handles(logits):
        from kernels.sampling import gpu

        return gpu.sample(logits, batch)
    return composed.sample(logits, batch)


def log_probabilities(logits: Tensor, targets: Tensor, num_top: int) -> Logprobs:
    """Log probabilities of ``targets`` (int64 [N]) under softmax of ``logits`` (float32 [N, V]), and of the top ids."""
    if logits.is_cpu and available():
        return native.log_probabilities(logits, targets, num_top)
    if gpu_library.handles(logits):
        from kernels.sampling import gpu_logprobs

        return gpu_logprobs.log_probabilities(logits, targets, num_top)
    return composed.log_probabilities(logits, targets, num_top)
