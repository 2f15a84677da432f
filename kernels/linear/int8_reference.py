"""Torch reference of int8 weights: what ``kernels.linear.int8`` computes, to rounding."""

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST = 127


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8 [N, K], -127 to 127) and scales (float32 [N]) of a floating-point ``weight`` [N, K].

    Symmetric and per row: scale = absmax / 127, code = weight / scale, rounded to nearest, ties to even. A row of
    zeros has scale 0; one with a value that is not finite has scale NaN and codes 0.
    """
    wide = weight.float()
    absmax = wide.abs().amax(1)
    scales = torch.where(absmax.isfinite(), absmax / _LARGEST, torch.nan)
    codes = (wide / scales[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return codes.nan_to_num(0.0).to(torch.int8), scales


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``x @ (codes * scales).T + bias`` computed in float64, as ``out_dtype`` or x's dtype."""
    wide = functional.linear(x.double(), codes.double()) * scales.double()
    return (wide if bias is None else wide + bias.double()).to(out_dtype or x.dtype)


def embedding(input_ids: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Rows ``input_ids`` of ``codes * scales`` as bfloat16."""
    return (codes[input_ids].float() * scales[input_ids, None]).bfloat16()
