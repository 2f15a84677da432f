"""The fused rotation and append against its parts, bit by bit."""

from collections.abc import Iterator

import pytest
import torch

from kernels.kv_append import native as native_append
from kernels.kv_append import reference as reference_append
from kernels.rotary import apply_rotary, norm_rotary
from kernels.rotary_append import Rotation, rotary_append

from .test_native_build import ISAS, use_isa


@pytest.fixture(autouse=True, scope="module", params=ISAS)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        yield from use_isa(patch, request.param)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("block_size", [4, 16, 48])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 48), (16, 8, 128), (3, 3, 16)])
def test_bits_are_those_of_the_parts(
    threads: int, normed: bool, block_size: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Whatever lies in slots that no token has, and runs of neighbouring slots and single ones, in any order."""
    torch.manual_seed(0)
    starts, counts = torch.tensor([5, 100, 40, 160, 33, 96]), [7, 35, 1, 20, 1, 3]
    slots = torch.cat([start + torch.arange(count) for start, count in zip(starts, counts, strict=True)])
    projected = torch.randn(len(slots), heads + 2 * kv_heads, head_dim).bfloat16()
    query, key, value = projected.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.randn(len(slots), head_dim // 2) * 10
    norms = tuple(torch.randn(2, head_dim).bfloat16()) if normed else (None, None)
    rotation = Rotation(angles.cos(), angles.sin(), *norms, eps=1e-6)
    shape = (2, 192 // block_size, block_size, kv_heads, head_dim)
    caches, expected = (torch.full(shape, torch.nan, dtype=torch.bfloat16) for _ in range(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        given, *others = projected.clone().split([heads, kv_heads, kv_heads], dim=1)
        rotated = rotary_append(given, key, value, rotation, caches[0], caches[1], slots, native_append.kv_append)
        assert rotated.data_ptr() == given.data_ptr()
        assert torch.equal(torch.cat(others, 1), projected[:, heads:])
        torch.set_num_threads(1)
        parts = [
            apply_rotary(x, rotation.cos, rotation.sin)
            if norm is None
            else norm_rotary(x, norm, rotation.eps, rotation.cos, rotation.sin)
            for x, norm in zip((query, key), norms, strict=True)
        ]
        for token, slot in enumerate(slots):  # one by one
            span = slice(token, token + 1)
            native_append.kv_append(parts[1][span], value[span], expected[0], expected[1], slot.view(1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rotated, parts[0])
    assert torch.equal(caches.view(torch.int16), expected.view(torch.int16))
    assert caches.isnan().sum() == caches.numel() - 2 * key.numel()


@pytest.mark.parametrize("rows", [[], [0, 7, 8], list(range(9))], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("native", [True, False])
def test_queries_of_some_tokens_have_their_bits_among_all(rows: list[int], normed: bool, native: bool) -> None:
    torch.manual_seed(1)
    dtype, append = (torch.bfloat16, native_append.kv_append) if native else (torch.float32, reference_append.kv_append)
    query, key, value = torch.randn(9, 8, 16).to(dtype).split([4, 2, 2], dim=1)
    angles = torch.randn(9, 8) * 10
    norms = tuple(torch.randn(2, 16).to(dtype)) if normed else (None, None)
    rotation = Rotation(angles.cos(), angles.sin(), *norms, eps=1e-6)
    slots, chosen = torch.randperm(32)[:9], torch.tensor(rows, dtype=torch.int64)
    caches, expected = (torch.zeros(2, 2, 16, 2, 16, dtype=dtype) for _ in range(2))
    some = rotary_append(query[chosen], key, value, rotation, caches[0], caches[1], slots, append, chosen)
    every = rotary_append(query, key, value, rotation, expected[0], expected[1], slots, append)
    assert torch.equal(some, every[chosen])
    assert torch.equal(caches, expected)
    assert caches.any()


def test_caches_need_not_begin_with_a_cache_line() -> None:
    torch.manual_seed(0)
    slots = torch.arange(16, 48)
    query, key, value = torch.randn(len(slots), 8, 32).bfloat16().split([4, 2, 2], dim=1)
    angles = torch.randn(len(slots), 16)
    rotation = Rotation(angles.cos(), angles.sin())
    shape = (2, 3, 16, 2, 32)
    aligned = torch.zeros(shape, dtype=torch.bfloat16)
    shifted = torch.zeros(aligned.numel() + 8, dtype=torch.bfloat16)[8:].view(shape)
    for caches in (aligned, shifted):
        rotary_append(query, key, value, rotation, caches[0], caches[1], slots, native_append.kv_append)
    assert aligned.data_ptr() % 64 == 0 and shifted.data_ptr() % 64 == 16
    assert aligned.any() and torch.equal(shifted, aligned)
