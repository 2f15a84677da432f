"""Pieces of a sampler: noise that depends on nothing but the token's identity, and nucleus filters.

These are torch operations; fused samplers (native, Triton) compute the same inside.
"""

from torch import Tensor

from kernels.sampling import reference


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [S, vocab_size] (float32), a pure function of (seed, position, vocabulary id).

    seed: int64 [S], the bit pattern of a uint64; position: int64 [S], absolute position of the token being sampled.

    The uniform bits come from a counter-based generator in exact integer arithmetic, equal on every device: row key
    ``mix(mix(seed) + GOLDEN * (position + 1))``, bits ``mix(key + GOLDEN * (id + 1))``, with increment and finaliser of
    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the finaliser is
    Stafford's mix 13). The top 40 bits give u in (0, 1), and the noise is -log(-log(1 - u)), whose logarithms are the
    device's own. argmax(logits + noise) is an exact sample of softmax(logits) (Gumbel-max).
    """
    return reference.gumbel_noise(seed, position, vocab_size)


def mask_top_k_top_p(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """``logits`` with every id outside the top k, then outside the nucleus of mass p, set to -inf.

    logits: float32 [S, V], less than infinite; top_k: int32 [S], 0 = all; top_p: float32 [S] in (0, 1], 1 = all; None =
    no row uses it. The nucleus (Holtzman et al. 2020) is the smallest set of most likely ids whose probability,
    renormalised over the top k, reaches p: the id that crosses p stays. Ids tied with the last one kept stay too, so
    the result does not depend on the order of ids. The most likely id always stays.
    """
    return reference.mask_top_k_top_p(logits, top_k, top_p)
