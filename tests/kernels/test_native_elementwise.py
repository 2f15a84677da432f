"""Native norms, rotary and activation against the torch reference, and their bits against rows and threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.activation import reference as activation_reference
from kernels.activation import silu_and_mul
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rms_norm import reference as norm_reference
from kernels.rotary import apply_rotary, norm_rotary
from kernels.rotary import reference as rotary_reference
from kernels.rotary_angles import reference as angles_reference
from kernels.rotary_angles import rotary_angles

from .test_native_build import ISAS, use_isa

WIDTHS = [2, 6, 32, 70, 128, 1026]


@pytest.fixture(autouse=True, params=ISAS)
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from use_isa(monkeypatch, request.param)


def assert_close(output: Tensor, expected: Tensor) -> None:
    """Equal but for a last bit of bfloat16 here and there, where a sum was rounded in another order."""
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-9)
    assert (output != expected).float().mean() < 0.01


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int) -> None:
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(shape).bfloat16() for shape in ((60, 3, width), (60, 3, width), (width,)))
    assert_close(rms_norm(x, weight, 1e-6), norm_reference.rms_norm(x, weight, 1e-6))
    normalised, total = add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = norm_reference.add_rms_norm(x, residual, weight, 1e-5)
    assert_close(normalised, expected)
    assert torch.equal(total, expected_total)
    assert torch.equal(rms_norm(total, weight, 1e-5), normalised)


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_and_mul(width: int) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(203, 2 * width) * 10).bfloat16()
    assert_close(silu_and_mul(gate_up), activation_reference.silu_and_mul(gate_up))


def test_silu_of_extremes() -> None:
    gates = torch.tensor([[-3e38, -200.0, -88.8, 0.0, 3e38, torch.nan, torch.inf]]).bfloat16()
    output = silu_and_mul(torch.cat((gates, torch.ones_like(gates)), dim=-1))
    expected = activation_reference.silu_and_mul(torch.cat((gates, torch.ones_like(gates)), dim=-1))
    torch.testing.assert_close(output, expected, equal_nan=True, rtol=0, atol=1e-30)


@pytest.mark.parametrize("size", [1, 10, 64])
def test_rotary_angles(size: int) -> None:
    """Far positions too: what cosines and sines need is the whole angle. A row's bits are its own."""
    positions = torch.tensor([0, 1, 40_959, 131_071, *range(200)])
    inv_freq = 1.0 / 10_000 ** (torch.arange(size) / size)
    found = rotary_angles(positions, inv_freq, torch.bfloat16)
    for values, expected in zip(found, angles_reference.rotary_angles(positions, inv_freq), strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-7)
    alone = rotary_angles(positions[3:4], inv_freq, torch.bfloat16)
    assert all(torch.equal(one[0], many[3]) for one, many in zip(alone, found, strict=True))


@pytest.mark.parametrize("head_dim", [2, 20, 64, 128, 256])
def test_rotary(head_dim: int) -> None:
    torch.manual_seed(0)
    fused = torch.randn(50, 5 * head_dim).bfloat16()  # heads are strided views of a merged projection
    heads = torch.unflatten(fused[:, head_dim : 4 * head_dim], 1, (3, head_dim))
    angles = torch.randn(50, head_dim // 2) * 100
    cos, sin, weight = angles.cos(), angles.sin(), torch.randn(head_dim).bfloat16()
    assert torch.equal(apply_rotary(heads, cos, sin), rotary_reference.apply_rotary(heads, cos, sin))
    assert_close(
        norm_rotary(heads, weight, 1e-6, cos, sin), rotary_reference.norm_rotary(heads, weight, 1e-6, cos, sin)
    )
    assert torch.equal(
        norm_rotary(heads, weight, 1e-6, cos, sin), apply_rotary(rms_norm(heads, weight, 1e-6), cos, sin)
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "operation",
    [
        silu_and_mul,
        lambda x: rms_norm(x, torch.ones_like(x[0]), 1e-6),
        lambda x: add_rms_norm(x, x * 2, torch.ones_like(x[0]), 1e-6)[0],
        lambda x: norm_rotary(
            x.unsqueeze(1), torch.ones_like(x[0]), 1e-6, x[:, ::2].float().cos(), x[:, ::2].float().sin()
        ).flatten(1),
    ],
    ids=["silu_and_mul", "rms_norm", "add_rms_norm", "norm_rotary"],
)
def test_rows_keep_their_bits(operation: Callable[[Tensor], Tensor], threads: int) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in WIDTHS:
            x = (torch.randn(203, width) * 4).bfloat16()
            expected = operation(x)
            for first, last in ((0, 1), (3, 4), (1, 8), (0, 100), (77, 203)):
                assert torch.equal(operation(x[first:last].clone()), expected[first:last])
    finally:
        torch.set_num_threads(before)
