"""The registry of attention backends: which there are, which of them can serve a model here, and which is chosen."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kernels.gpu import library as gpu_library
from kernels.kv_append import native as native_append
from kernels.kv_append import reference as reference_append
from kernels.native import library as native_library
from kernels.paged_attention import flash, native, reference
from kernels.paged_attention.plan import AttentionPlan
from kernels.rotary_append import Append

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 16  # tokens: small enough that little of a sequence's last block is wasted

BackendName = Literal["auto", "native", "triton", "flash", "reference"]
Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan, float], Tensor]


class BackendError(ValueError):
    """The backend that was asked for cannot serve the model here; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a backend must be able to serve."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int
    exact: bool = False  # a row's bits must not depend on its batch


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """An attention, and the append that writes the cache as this attention reads it."""

    name: str
    append: Append
    attend: Attend
    is_capturable: bool  # launches the same kernels whatever a step's lengths are, so that a CUDA graph may hold them


@dataclass(frozen=True, slots=True)
class _Entry:
    """A backend of the registry."""

    make: Callable[[AttentionShape], AttentionBackend]
    obstacle: Callable[[AttentionShape], str | None]  # why it cannot serve a shape
    risk: Callable[[], str | None] = lambda: None  # why it serves only where it was asked for


def default_block_size(name: BackendName) -> int:
    """Tokens per block where nobody says how many, for the backend that was asked for."""
    return max(_BLOCK_SIZE, flash.block_multiple()) if name == "flash" else _BLOCK_SIZE


def choose_backend(name: BackendName, shape: AttentionShape) -> AttentionBackend:
    """The backend called ``name``, or for ``auto`` the first in order of preference that can; logs which and why.

    Raises:
        BackendError: the backend that was asked for cannot serve ``shape``, or none can.
    """
    if name != "auto":
        obstacle = _REGISTRY[name].obstacle(shape)
        if obstacle is not None:
            raise BackendError(f"{name}: {obstacle}")
        logger.info("attention backend: %s (asked for)", name)
        return _REGISTRY[name].make(shape)
    passed: list[str] = []
    for candidate, entry in _REGISTRY.items():
        obstacle = entry.obstacle(shape) or entry.risk()
        if obstacle is None:
            logger.info("attention backend: %s (%s)", candidate, "; ".join(passed) or "preferred")
            return entry.make(shape)
        passed.append(f"not {candidate}: {obstacle}")
    raise BackendError(f"auto: {'; '.join(passed)}")


def _native_obstacle(shape: AttentionShape) -> str | None:
    if not native_library.handles_dtype(shape.device, shape.dtype):
        return "needs bfloat16 on a CPU with native kernels"
    return None if shape.head_dim % 16 == 0 else f"head size {shape.head_dim} is no multiple of 16"


def _triton_obstacle(shape: AttentionShape) -> str | None:
    if shape.device.type == "cpu":
        return None if gpu_library.interpreted() else "needs a GPU"
    return None if gpu_library.available() else "triton is not installed, or switched off"


def _flash_obstacle(shape: AttentionShape) -> str | None:
    if shape.device.type != "cuda":
        return "needs a GPU"
    if flash.installed() is None:
        return "flash-attn is not installed"
    if shape.exact:
        return "a row's bits depend on its batch"
    if shape.dtype not in {torch.bfloat16, torch.float16}:
        return "needs bfloat16 or float16"
    if shape.head_dim > 256 or shape.head_dim % 8:
        return f"head size {shape.head_dim} is no multiple of 8 up to 256"
    if shape.block_size % flash.block_multiple():
        return f"block size {shape.block_size} is no multiple of {flash.block_multiple()}"
    return None


def _reference_obstacle(shape: AttentionShape) -> str | None:
    return "a row's bits depend on its batch" if shape.exact and shape.device.type != "cpu" else None


def _make_triton(shape: AttentionShape) -> AttentionBackend:
    from kernels.kv_append import gpu as append
    from kernels.paged_attention import gpu

    return AttentionBackend("triton", append.kv_append, partial(gpu.paged_attention, exact=shape.exact), True)


def _make_flash(shape: AttentionShape) -> AttentionBackend:
    from kernels.kv_append import kv_append

    return AttentionBackend("flash", kv_append, flash.paged_attention, True)


# In order of preference. Native comes first: only CPUs have it, unless somebody asked for Triton's interpreter.
_REGISTRY: dict[str, _Entry] = {
    "native": _Entry(
        lambda shape: AttentionBackend("native", native_append.kv_append, native.paged_attention, False),
        _native_obstacle,
    ),
    "flash": _Entry(_make_flash, _flash_obstacle, flash.risk),
    "triton": _Entry(_make_triton, _triton_obstacle),
    "reference": _Entry(
        lambda shape: AttentionBackend("reference", reference_append.kv_append, reference.paged_attention, False),
        _reference_obstacle,
    ),
}
