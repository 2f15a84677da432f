"""Torch reference of linear and embedding."""

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """See ``kernels.linear.linear``; rounded to x's dtype before ``out_dtype``."""
    return functional.linear(x, weight, bias).to(out_dtype or x.dtype)


def embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """See ``kernels.linear.embedding``."""
    return functional.embedding(input_ids, weight)
