"""Gated activations of feed-forward layers."""

from torch import Tensor

from kernels.activation import native, reference
from kernels.gpu import library as gpu_library
from kernels.native.library import handles

__all__ = ["silu_and_mul"]


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last dimension. gate_up: [T, 2 * I]; returns [T, I], same dtype.

    silu is computed in float32 and rounded to the dtype before the product, as in the checkpoints' own code.
    """
    if handles(gate_up):
        return native.silu_and_mul(gate_up)
    if gpu_library.handles(gate_up):
        from kernels.activation import gpu

        return gpu.silu_and_mul(gate_up)
    return reference.silu_and_mul(gate_up)
