"""Linear layers, split the way tensor parallelism splits them: columns first, rows second.

Weights are [out, in] as in checkpoints. Each layer names the checkpoint tensors it is made of and the part of its own
parameters that each one fills, so that merged weights are loaded in place. Once loaded, ``pack_weight`` replaces the
parameter by the layout that kernels read fastest.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from kernels.linear import Matrix, add_linear, linear, linear_silu_and_mul, split


class Packer(Protocol):
    """A loaded weight [out, in] to what kernels read; ``gated`` as of ``kernels.linear.pack``."""

    def __call__(self, weight: Tensor, *, gated: bool = False) -> Matrix: ...


class MergedColumnParallelLinear(nn.Module):
    """Several projections of the same input as one product; query, key and value, or gate and up.

    ``gated``: of two projections, SiLU of the first gates the second.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Mapping[str, int],
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
        *,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self._output_sizes = dict(output_sizes)
        self._gated = gated
        self.weight = empty_parameter((sum(output_sizes.values()), input_size), device, dtype)
        self.bias = empty_parameter((sum(output_sizes.values()),), device, dtype) if bias else None
        self._matrix: Matrix = self.weight.data
        self._parts: tuple[Matrix, Matrix] | None = None  # the first projection and the others, where they can be split

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] to [T, sum of output sizes], or half of that if gated."""
        if self._gated:
            return linear_silu_and_mul(x, self._matrix, self.bias)
        return linear(x, self._matrix, self.bias, None)

    def first_of_rows(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The first projection, of ``rows`` (int64 [S]) alone, and the others of all: [S, first output size] and
        [T, sum of the other sizes]. The bits are those of ``forward``, which gates nothing here.
        """
        first, *others = self._output_sizes.values()
        sizes = [first, sum(others)]
        if self._parts is None:
            projected, rest = self.forward(x).split_with_sizes(sizes, 1)
            return projected.index_select(0, rows), rest
        weight, other_weights = self._parts
        bias, other_biases = (None, None) if self.bias is None else self.bias.split_with_sizes(sizes)
        return linear(x.index_select(0, rows), weight, bias, None), linear(x, other_weights, other_biases, None)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(``name.weight`` or ``name.bias``, the view that it fills) of each projection."""
        sizes = list(self._output_sizes.values())
        for name, part in zip(self._output_sizes, torch.split(self.weight, sizes), strict=True):
            yield f"{name}.weight", part
        if self.bias is not None:
            for name, part in zip(self._output_sizes, torch.split(self.bias, sizes), strict=True):
                yield f"{name}.bias", part

    def pack_weight(self, packer: Packer) -> None:
        """Keep the weight as kernels read it, and no longer as a parameter. Once only."""
        self._matrix = packer(self.weight.data, gated=self._gated)
        self._parts = None if self._gated else split(self._matrix, next(iter(self._output_sizes.values())))
        del self.weight


class RowParallelLinear(nn.Module):
    """The projection back to the hidden size after a column-parallel layer."""

    def __init__(self, input_size: int, output_size: int, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter((output_size, input_size), device, dtype)
        self.bias = empty_parameter((output_size,), device, dtype) if bias else None
        self._matrix: Matrix = self.weight.data

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor | None, Tensor]:
        """[T, in] to [T, out], added to ``residual`` in place, or still to be added (``RMSNorm.add``): the latter, if
        so, and the residual stream.
        """
        if add_linear(x, self._matrix, self.bias, residual):
            return None, residual
        return linear(x, self._matrix, self.bias, None), residual

    def pack_weight(self, packer: Packer) -> None:
        """Keep the weight as kernels read it, and no longer as a parameter. Once only."""
        self._matrix = packer(self.weight.data)
        del self.weight


def empty_parameter(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Uninitialised memory that loading fills."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
