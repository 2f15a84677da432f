"""C++ kernels of sampling: cpu.cpp."""

import torch
from torch import Tensor

from kernels.native.library import NativeFunction

_gumbel_noise = NativeFunction("baton_gumbel_noise", "pppiin")
_mask = NativeFunction("baton_mask_top_k_top_p", "ppppiin")


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """See ``kernels.sampling.gumbel_noise``."""
    seed, position = seed.contiguous(), position.contiguous()
    out = torch.empty((seed.shape[0], vocab_size), dtype=torch.float32)
    _gumbel_noise(
        seed.data_ptr(), position.data_ptr(), out.data_ptr(), seed.shape[0], vocab_size, torch.get_num_threads()
    )
    return out


def mask_top_k_top_p(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """See ``kernels.sampling.mask_top_k_top_p``; found by radix selection, with sums in double precision."""
    logits = logits.contiguous()
    top_k = None if top_k is None else top_k.contiguous()
    top_p = None if top_p is None else top_p.contiguous()
    out = torch.empty_like(logits)
    _mask(
        logits.data_ptr(),
        None if top_k is None else top_k.data_ptr(),
        None if top_p is None else top_p.data_ptr(),
        out.data_ptr(),
        *logits.shape,
        torch.get_num_threads(),
    )
    return out
