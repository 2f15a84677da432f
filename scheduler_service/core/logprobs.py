"""Log probabilities of tokens as columns: taken in from executors and handed on, never looked into."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LogprobColumns:
    """Log probabilities of N tokens.

    Attributes:
        logprobs: float32 [N], natural logarithms.
        ranks: int32 [N], 1 = the most likely token.
        top_counts: int32 [N], how many of the most likely tokens are listed for each.
        top_token_ids, top_logprobs: int32 and float32 [sum of top_counts], best first.
    """

    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]
    top_counts: NDArray[np.int32]
    top_token_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.logprobs)

    @property
    def is_consistent(self) -> bool:
        """Whether the columns' lengths agree."""
        if not len(self.logprobs) == len(self.ranks) == len(self.top_counts):
            return False
        counts = self.top_counts
        total = int(counts.sum())
        return bool((counts >= 0).all()) and len(self.top_token_ids) == len(self.top_logprobs) == total

    def take(self, indices: NDArray[np.intp]) -> "LogprobColumns":
        """The tokens at ``indices``, in that order."""
        ends = np.cumsum(self.top_counts)
        counts = self.top_counts[indices]
        new_ends = np.cumsum(counts)
        shift = (ends[indices] - counts) - (new_ends - counts)  # from a token's new place in the top columns to its old
        top = np.repeat(shift, counts) + np.arange(counts.sum())
        return LogprobColumns(
            self.logprobs[indices], self.ranks[indices], counts, self.top_token_ids[top], self.top_logprobs[top]
        )


def concatenate(parts: list[LogprobColumns]) -> LogprobColumns:
    """All ``parts`` as one; at least one is given."""
    if len(parts) == 1:
        return parts[0]
    return LogprobColumns(
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.ranks for part in parts]),
        np.concatenate([part.top_counts for part in parts]),
        np.concatenate([part.top_token_ids for part in parts]),
        np.concatenate([part.top_logprobs for part in parts]),
    )
