"""Rotary embedding of a step's queries and keys together with the append of its keys and values."""

from collections.abc import Callable

from torch import Tensor

from kernels.gpu.library import handles
from kernels.kv_append import native as native_append
from kernels.rotary import apply_rotary, norm_rotary
from kernels.rotary_append import native
from kernels.rotary_append.rotation import Rotation

__all__ = ["Append", "Rotation", "rotary_append"]

Append = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    append: Append,
    rows: Tensor | None = None,
) -> Tensor:
    """Rotate ``query`` and ``key`` (``kernels.rotary``), write ``key`` and ``value`` to the cache; the rotated query.

    query: [T, heads, head_dim], or [S, heads, head_dim] of the tokens ``rows`` (int64 [S]); the rest as of
    ``kernels.kv_append.kv_append``, which ``append`` stands for where the parts run one after another. On a GPU, and
    where native kernels append, they are one kernel unless there are ``rows``, so that rotated keys never visit memory
    in between. ``query`` is given up: the result may lie in its place.
    """
    if rows is not None:
        append(_rotate(key, rotation.key_norm, rotation), value, key_cache, value_cache, slot_mapping)
        return _rotate(query, rotation.query_norm, rotation.of(rows))
    if handles(query):
        from kernels.rotary_append import gpu

        return gpu.rotary_append(query, key, value, rotation, key_cache, value_cache, slot_mapping)
    if append is native_append.kv_append:
        return native.rotary_append(query, key, value, rotation, key_cache, value_cache, slot_mapping)
    query = _rotate(query, rotation.query_norm, rotation)
    append(_rotate(key, rotation.key_norm, rotation), value, key_cache, value_cache, slot_mapping)
    return query


def _rotate(heads: Tensor, norm: Tensor | None, rotation: Rotation) -> Tensor:
    if norm is None:
        return apply_rotary(heads, rotation.cos, rotation.sin)
    return norm_rotary(heads, norm, rotation.eps, rotation.cos, rotation.sin)
