"""The layout of a linear layer's weight for native kernels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A bfloat16 matrix [rows, columns] in blocks of 64 rows, pairs of columns adjacent, padded with zeros."""

    blocks: Tensor  # bfloat16 [ceil(rows / 64), ceil(columns / 2), 64, 2]
    rows: int
    columns: int
