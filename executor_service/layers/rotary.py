"""Rotary position embedding: angles of a step's tokens, computed once and used by all layers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rotary_angles import rotary_angles


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3's frequency-dependent scaling: long wavelengths are stretched by the factor, short ones are kept."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary frequencies of a model. ``factor`` without ``llama3`` is linear scaling; factor 1 is none."""

    head_dim: int
    theta: float
    factor: float = 1.0
    llama3: Llama3Scaling | None = None


class RotaryEmbedding:
    """Cosines and sines of positions."""

    def __init__(self, config: RopeConfig, device: torch.device, dtype: torch.dtype) -> None:
        """For a model of ``dtype``."""
        self._inv_freq = inverse_frequencies(config).to(device)
        self._dtype = dtype

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of int64 positions [T]: float32 [T, head_dim / 2] each."""
        return rotary_angles(positions, self._inv_freq, self._dtype)


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """Radians per position of each pair of dimensions: float32 [head_dim / 2], on the host."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    inv_freq = 1.0 / (config.theta**exponents)
    if config.llama3 is None:
        return inv_freq / config.factor
    return _scale_llama3(inv_freq, config.factor, config.llama3)


def _scale_llama3(inv_freq: Tensor, factor: float, scaling: Llama3Scaling) -> Tensor:
    """Scaling of the Llama 3.1 release: interpolates between kept and stretched in the band between the two factors."""
    turns = scaling.original_max_position * inv_freq / (2 * math.pi)  # over the original context
    band = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = ((turns - scaling.low_freq_factor) / band).clamp(0.0, 1.0)
    return (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
