"""Torch reference of sampling: see ``kernels.sampling`` for the definitions."""

import torch
from torch import Tensor

# SplitMix64 as int64 bit patterns; int64 products and sums wrap modulo 2^64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """See ``kernels.sampling.gumbel_noise``."""
    ids = torch.arange(1, vocab_size + 1, device=seed.device)
    row_key = _mix(_mix(seed.clone()) + (position + 1) * _GOLDEN)
    bits = _mix(row_key.unsqueeze(1) + (ids * _GOLDEN).unsqueeze(0))
    # Small u, where the noise is largest, keep all the resolution of a float; u rounded to 1 would give -inf.
    uniform = _shift_right(bits, 24).to(torch.float32).add_(0.5).mul_(2.0**-40).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    z.bitwise_xor_(_shift_right(z, 30)).mul_(_MIX_1)
    z.bitwise_xor_(_shift_right(z, 27)).mul_(_MIX_2)
    return z.bitwise_xor_(_shift_right(z, 31))


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own shifts in copies of the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mask_top_k_top_p(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """See ``kernels.sampling.mask_top_k_top_p``."""
    vocab_size = logits.shape[1]
    ranked = logits.sort(dim=-1, descending=True).values
    if top_k is not None:
        last = torch.where(top_k > 0, top_k, vocab_size).clamp_(max=vocab_size).long().unsqueeze(1) - 1
        least = ranked.gather(1, last)
        ranked.masked_fill_(ranked < least, -torch.inf)
    else:
        least = ranked[:, -1:]
    if top_p is not None:
        # The running sum of one row is sequential, whatever the number of rows; a plain sum of one row is not.
        mass = torch.exp(ranked - ranked[:, :1]).cumsum(-1)
        # An id stays while the mass before it is below p. The bound on the index is for p = 1 with rounding.
        kept = (mass < mass[:, -1:] * top_p.unsqueeze(1)).sum(-1, keepdim=True).clamp_(max=vocab_size - 1)
        nucleus = torch.where(top_p.unsqueeze(1) < 1.0, ranked.gather(1, kept), -torch.inf)
        least = torch.maximum(least, nucleus)
    return logits.masked_fill(logits < least, -torch.inf)
