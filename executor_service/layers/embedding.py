"""Token embedding and language model head, split over the vocabulary by tensor parallelism."""

import torch
from torch import Tensor, nn

from executor_service.layers.linear import Packer, empty_parameter
from kernels.linear import Matrix, embedding, linear


class VocabParallelEmbedding(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, vocab_size: int, hidden_size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter((vocab_size, hidden_size), device, dtype)
        self._matrix: Matrix = self.weight.data

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T] to [T, hidden]."""
        return embedding(input_ids, self._matrix)

    def share(self, matrix: Matrix) -> None:
        """Read rows of ``matrix``, a tied head's packed weight, instead of the parameter, which goes. Once only."""
        self._matrix = matrix
        del self.weight


class ParallelLMHead(nn.Module):
    """Hidden states to logits; a tied head shares its weight with the embedding."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._matrix: Matrix = weight.data

    def forward(self, hidden: Tensor) -> Tensor:
        """[S, hidden] to float32 [S, vocabulary]."""
        return linear(hidden, self._matrix, None, torch.float32)

    def pack_weight(self, packer: Packer) -> Matrix:
        """Keep the weight as kernels read it, and no longer as a parameter; returns it. Once only."""
        self._matrix = packer(self.weight.data)
        del self.weight
        return self._matrix
