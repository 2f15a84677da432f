"""A linear layer's weight of which no row's bits depend on how many rows there are, on a GPU."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class InvariantMatrix:
    """A plain weight [N, K] that ``linear`` multiplies by a kernel with one order of additions (``gpu``)."""

    weight: Tensor
