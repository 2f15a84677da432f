"""Triton's norms, rotary, activation and appends, interpreted, against the torch reference; odd sizes and strides."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.activation import gpu as activation_gpu
from kernels.activation import reference as activation_reference
from kernels.kv_append import gpu as append_gpu
from kernels.kv_append import reference as append_reference
from kernels.rms_norm import gpu as norm_gpu
from kernels.rms_norm import reference as norm_reference
from kernels.rotary import gpu as rotary_gpu
from kernels.rotary import reference as rotary_reference
from kernels.rotary_append import Rotation
from kernels.rotary_append import gpu as fused_gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
SPANS = [(0, 1), (3, 4), (1, 8), (0, 11)]


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("block", [16, 64, 1024])
def test_silu_and_mul(dtype: torch.dtype, block: int) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(11, 140) * 10).to(dtype)
    output = activation_gpu.silu_and_mul(gate_up, block)
    close(output, activation_reference.silu_and_mul(gate_up))
    assert torch.equal(output, activation_gpu.silu_and_mul(gate_up))
    for first, last in SPANS:
        assert torch.equal(activation_gpu.silu_and_mul(gate_up[first:last], block), output[first:last])
    assert activation_gpu.silu_and_mul(gate_up[:0]).shape == (0, 70)


@DTYPES
@pytest.mark.parametrize("size", [6, 70, 256])
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    x, residual, weight = ((torch.randn(shape) * 3).to(dtype) for shape in ((11, size), (11, size), (size,)))
    output, total = norm_gpu.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = norm_reference.add_rms_norm(x, residual, weight, 1e-6)
    close(output, expected)
    assert torch.equal(total, expected_total)
    assert torch.equal(norm_gpu.rms_norm(total, weight, 1e-6), output)
    for first, last in SPANS:
        alone, _ = norm_gpu.add_rms_norm(x[first:last], residual[first:last], weight, 1e-6)
        assert torch.equal(alone, output[first:last])


@DTYPES
@pytest.mark.parametrize("head_dim", [4, 20, 64])
def test_rotary(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(11, 5, head_dim).to(dtype)[:, 1:4], torch.randn(head_dim).to(dtype)
    angles = torch.randn(11, head_dim // 2) * 10
    cos, sin = angles.cos(), angles.sin()
    plain = rotary_gpu.norm_rotary(x, None, 0.0, cos, sin)
    close(plain, rotary_reference.apply_rotary(x, cos, sin))
    normed = rotary_gpu.norm_rotary(x, weight, 1e-6, cos, sin)
    close(normed, rotary_reference.norm_rotary(x, weight, 1e-6, cos, sin))
    for first, last in SPANS:
        span = slice(first, last)
        assert torch.equal(rotary_gpu.norm_rotary(x[span], weight, 1e-6, cos[span], sin[span]), normed[span])


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_append(dtype: torch.dtype, normed: bool) -> None:
    """Fused: the rotated query, and the cache that the parts would have written, from views of one projection."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim, tokens = 6, 2, 20, 7
    projected = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    query, key, value = projected.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.randn(tokens, head_dim // 2) * 10
    norms = tuple(torch.randn(2, head_dim).to(dtype)) if normed else (None, None)
    rotation = Rotation(angles.cos(), angles.sin(), *norms, eps=1e-6)
    slots = torch.tensor([6, 16, 3, 0, 19, 18, 9])
    caches, expected = (torch.full((2, 5, 4, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    rotated = fused_gpu.rotary_append(query, key, value, rotation, caches[0], caches[1], slots)
    parts = [
        rotary_gpu.norm_rotary(heads, norm, 1e-6, rotation.cos, rotation.sin)
        for heads, norm in zip((query, key), norms, strict=True)
    ]
    append_reference.kv_append(parts[1], value, expected[0], expected[1], slots)
    assert torch.equal(rotated, parts[0])
    torch.testing.assert_close(caches, expected, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("head_dim", [3, 16, 20])
def test_kv_append(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(0)
    fused = torch.randn(4, 6, head_dim).to(dtype)
    slots = torch.tensor([6, 16, 3, 19])
    caches, expected = (torch.full((2, 5, 4, 2, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    append_gpu.kv_append(fused[:, 1:3], fused[:, 4:], caches[0], caches[1], slots)
    append_reference.kv_append(fused[:, 1:3], fused[:, 4:], expected[0], expected[1], slots)
    torch.testing.assert_close(caches, expected, rtol=0, atol=0, equal_nan=True)
