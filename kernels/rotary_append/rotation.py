"""What turns queries and keys."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """How queries and keys are turned: their tokens' angles and, in some models, norms of each head before that."""

    cos: Tensor  # float32 [T, head_dim / 2]
    sin: Tensor  # float32 [T, head_dim / 2]
    query_norm: Tensor | None = None  # [head_dim]
    key_norm: Tensor | None = None  # [head_dim]
    eps: float = 0.0

    def of(self, tokens: Tensor) -> "Rotation":
        """That of these tokens, int64 [S], alone."""
        return replace(self, cos=self.cos.index_select(0, tokens), sin=self.sin.index_select(0, tokens))
