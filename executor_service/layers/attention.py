"""Attention over the paged cache."""

from torch import Tensor

from executor_service.context import get_context
from executor_service.metadata.attention import OutputRows
from kernels.paged_attention.backends import AttentionBackend
from kernels.rotary_append import Rotation, rotary_append


class Attention:
    """Appends a step's keys and values to its layer's cache and attends over it; holds no weights."""

    def __init__(self, head_dim: int) -> None:
        self._scale = head_dim**-0.5
        self._cache: tuple[Tensor, Tensor, AttentionBackend] | None = None

    def bind_cache(self, key_cache: Tensor, value_cache: Tensor, backend: AttentionBackend) -> None:
        """Use these tensors, [blocks, block_size, kv_heads, head_dim], and this backend from now on."""
        self._cache = (key_cache, value_cache, backend)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: Rotation | None = None,
        rows: OutputRows | None = None,
    ) -> Tensor:
        """query: [T, heads, head_dim], or [S, heads, head_dim] of ``rows`` that have a plan; key, value:
        [T, kv_heads, head_dim]. Returns [T, heads, head_dim], or [S, heads, head_dim] of ``rows``.

        Queries and keys are rotated first if there is a ``rotation``. Reads the step's metadata from the inference
        context. Raises ``RuntimeError`` when no cache is bound.
        """
        if self._cache is None:
            raise RuntimeError("attention ran before a KV cache was bound to its model")
        metadata = get_context().attention
        key_cache, value_cache, backend = self._cache
        slots, plan, tokens = metadata.slot_mapping, metadata.plan, None
        if rows is not None and rows.plan is not None:
            plan, tokens = rows.plan, rows.indices
        if rotation is None:
            backend.append(key, value, key_cache, value_cache, slots)
        else:
            query = rotary_append(query, key, value, rotation, key_cache, value_cache, slots, backend.append, tokens)
        attended = backend.attend(query, key_cache, value_cache, plan, self._scale)
        return attended if rows is None or tokens is not None else attended.index_select(0, rows.indices)
