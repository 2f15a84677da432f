"""Token embedding and language model head, split over the vocabulary by tensor parallelism."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from executor_service.layers.linear import empty_parameter


class VocabParallelEmbedding(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, vocab_size: int, hidden_size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter((vocab_size, hidden_size), device, dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T] to [T, hidden]."""
        return functional.embedding(input_ids, self.weight)


class ParallelLMHead(nn.Module):
    """Hidden states to logits; a tied head shares its weight with the embedding."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[S, hidden] to float32 [S, vocabulary]."""
        return functional.linear(hidden, self.weight).float()
