"""The memory that holds keys and values of all attention layers, cut into blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from executor_service.models.config import ModelConfig
from executor_service.models.decoder import CausalLM
from kernels.native import memory
from kernels.paged_attention.backends import AttentionBackend


@dataclass(frozen=True, slots=True)
class KVCache:
    """Paged keys and values, one pair of tensors per attention layer.

    Each tensor is [num_blocks + 1, block_size, num_key_value_heads, head_dim]. The last block (id ``num_blocks``) is
    the dummy block: padding tokens are written there and padded block tables point to it; it belongs to no request.
    Blocks can be copied whole; where elements lie inside one is the kernels' own matter (``kernels.kv_append``).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_blocks: int
    block_size: int

    @property
    def dummy_block(self) -> int:
        """Id of the block that takes padding."""
        return self.num_blocks

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values."""
        per_layer = block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return 2 * config.num_hidden_layers * per_layer

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Zeroed memory for ``num_blocks`` blocks and the dummy block.

        Raises ``ValueError`` when a size is not positive.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache needs at least one block of one token, not {num_blocks} of {block_size}")
        shape = (num_blocks + 1, block_size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(_zeros(shape, device, dtype) for _ in layers),
            values=tuple(_zeros(shape, device, dtype) for _ in layers),
            num_blocks=num_blocks,
            block_size=block_size,
        )

    def touch(self) -> None:
        """Take all of the memory now, rather than page by page while steps wait for it."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def bind(self, model: CausalLM, backend: AttentionBackend) -> None:
        """Give each attention layer of ``model`` its own pair of tensors, and the ``backend`` that reads them."""
        for attention, key_cache, value_cache in zip(model.attention_layers(), self.keys, self.values, strict=True):
            attention.bind_cache(key_cache, value_cache, backend)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """On CPU an idle cache takes no RAM."""
    return memory.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, device=device, dtype=dtype)
