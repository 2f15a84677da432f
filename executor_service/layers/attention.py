"""Attention over the paged cache."""

from torch import Tensor, nn

from executor_service.context import get_context
from kernels.kv_append import kv_append
from kernels.paged_attention import paged_attention


class Attention(nn.Module):
    """Appends a step's keys and values to its layer's cache and attends over it; holds no weights."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self._scale = head_dim**-0.5
        self._cache: tuple[Tensor, Tensor] | None = None

    def bind_cache(self, key_cache: Tensor, value_cache: Tensor) -> None:
        """Use these tensors, [blocks, block_size, kv_heads, head_dim], from now on."""
        self._cache = (key_cache, value_cache)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [T, heads, head_dim]; key, value: [T, kv_heads, head_dim]. Returns [T, heads, head_dim].

        Reads the step's metadata from the inference context. Raises ``RuntimeError`` when no cache is bound.
        """
        if self._cache is None:
            raise RuntimeError("attention ran before a KV cache was bound to its model")
        metadata = get_context().attention
        key_cache, value_cache = self._cache
        kv_append(key, value, key_cache, value_cache, metadata.slot_mapping)
        return paged_attention(query, key_cache, value_cache, metadata.plan, self._scale)
