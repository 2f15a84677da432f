"""The layout of a linear layer's weight for native kernels, and what they do with products."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Output(IntEnum):
    """What becomes of a product; as in blocks.h."""

    BF16 = 0
    FLOAT = 1
    ADDED = 2  # to what is there, rounded first

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Output":
        """Written as ``dtype``: bfloat16 or float32."""
        return cls.FLOAT if dtype is torch.float32 else cls.BF16


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A bfloat16 matrix [rows, columns] in blocks of 64 rows, pairs of columns adjacent, padded with zeros.

    In a gated one a block holds 32 rows of the first half, then the same ones of the second half, which they gate.
    """

    blocks: Tensor  # bfloat16 [ceil(rows / 64), ceil(columns / 2), 64, 2]
    rows: int
    columns: int
    gated: bool = False

    def split(self, rows: int) -> "tuple[PackedMatrix, PackedMatrix] | None":
        """See ``kernels.linear.split``."""
        whole, rest = divmod(rows, self.blocks.shape[2])
        if rest or self.gated:
            return None
        first = PackedMatrix(self.blocks[:whole], rows, self.columns)
        return first, PackedMatrix(self.blocks[whole:], self.rows - rows, self.columns)
