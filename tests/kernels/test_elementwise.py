"""Norms, rotary, activation and append against plain formulas, and their bits against position in memory."""

from collections.abc import Callable

import pytest
import torch

from kernels.activation import silu_and_mul
from kernels.kv_append import kv_append
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import apply_rotary

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])


@DTYPES
def test_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((5, 3, 40), (5, 3, 40), (40,)))
    total = (x + residual).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    normalised, added = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(added, x + residual)
    torch.testing.assert_close(normalised.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(normalised, rms_norm(x + residual, weight, 1e-6))


@DTYPES
def test_silu_and_mul(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(7, 60) * 20).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(silu_and_mul(gate_up).double(), expected, rtol=tolerance, atol=tolerance)


def test_silu_of_extremes_is_finite() -> None:
    gate_up = torch.tensor([[-3e38, -200.0, 3e38, 1.0, 1.0, 1.0]])
    assert torch.equal(silu_and_mul(gate_up), torch.tensor([[0.0, 0.0, 3e38]]))


@DTYPES
def test_rotary_is_a_complex_rotation(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(6, 3, 20).to(dtype), torch.randn(6, 10) * 10
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones(6, 1, 10).double(), angles.double().unsqueeze(1))
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    output = apply_rotary(x, angles.cos(), angles.sin())
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=max(tolerance, 1e-5))


def test_kv_append_writes_slots_only() -> None:
    torch.manual_seed(0)
    caches = torch.zeros(2, 5, 4, 2, 3)
    fused = torch.randn(3, 4, 3)  # keys and values are strided views of a merged projection
    key, value = fused[:, :2], fused[:, 2:]
    kv_append(key, value, caches[0], caches[1], torch.tensor([6, 16, 3]))
    for cache, rows in zip(caches, (key, value), strict=True):
        assert torch.equal(cache[1, 2], rows[0])
        assert torch.equal(cache[4, 0], rows[1])
        assert torch.equal(cache[0, 3], rows[2])
        assert cache.count_nonzero() == rows.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "operation",
    [
        silu_and_mul,
        lambda x: rms_norm(x.view(x.shape[0], 2, -1), torch.ones_like(x[0, : x.shape[1] // 2]), 1e-6).flatten(1),
        lambda x: apply_rotary(x.unsqueeze(1), *(f(x[:, ::2].float()) for f in (torch.cos, torch.sin))).flatten(1),
    ],
    ids=["silu_and_mul", "rms_norm", "rotary"],
)
def test_rows_keep_their_bits(
    operation: Callable[[torch.Tensor], torch.Tensor], threads: int, dtype: torch.dtype
) -> None:
    """Whatever the number of rows and their place: vector bodies and tails, and threads' shares, must agree."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in (6, 70, 1026):
            x = (torch.randn(203, width) * 4).to(dtype)
            expected = operation(x)
            for first, last in ((0, 1), (3, 4), (1, 8), (0, 100), (77, 203)):
                assert torch.equal(operation(x[first:last].clone()), expected[first:last])
    finally:
        torch.set_num_threads(before)
