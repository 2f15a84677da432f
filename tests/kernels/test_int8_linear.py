"""Int8 weights: what they are, their products against the reference, and their bits against rows and threads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.linear import (
    Int8Matrix,
    QuantizationError,
    add_linear,
    embedding,
    int8,
    int8_reference,
    linear,
    pack,
    split,
)
from kernels.native import build, library

from .test_native_build import ISAS, forget, use_isa

NO_VBMI = "avx512_bf16 without vbmi"
SHAPES = [(1, 1), (3, 5), (64, 2), (65, 33), (130, 48), (199, 47), (1000, 512), (80, 4097), (129, 9001)]


@pytest.fixture(autouse=True, params=[*ISAS, NO_VBMI])
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == NO_VBMI:
        monkeypatch.setattr(build, "_isa_flags", lambda isa: build._ISA_FLAGS[isa])
        monkeypatch.setattr(
            build, "_sources", lambda: [Path(int8.__file__).with_suffix(".cpp")]
        )  # the rest is no other
    yield from use_isa(monkeypatch, request.param.partition(" ")[0])


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_weight(shape: tuple[int, int], seed: int) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(shape[0], 1, generator=generator).mul(4).exp()
    return (torch.randn(shape, generator=generator) * sizes).bfloat16()


def packed(weight: Tensor) -> Int8Matrix:
    matrix = pack(weight, quantization="int8")
    assert isinstance(matrix, Int8Matrix)
    return matrix


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adding_in_place_has_the_bits_of_a_sum(shape: tuple[int, int]) -> None:
    torch.manual_seed(8)
    matrix, x = packed(random_weight(shape, 3)), torch.randn(67, shape[1]).bfloat16()
    bias, total = torch.randn(shape[0]).bfloat16(), torch.randn(67, shape[0]).bfloat16() * 9
    expected = total + linear(x, matrix, bias, None)
    assert add_linear(x, matrix, bias, total)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_against_the_reference(shape: tuple[int, int], with_bias: bool) -> None:
    weight, x = random_weight(shape, 0), torch.randn(301, shape[1]).bfloat16()
    codes, scales = int8_reference.quantize(weight)
    bias = (scales * torch.randn(shape[0])).bfloat16() if with_bias else None
    matrix = packed(weight)
    output = linear(x, matrix, bias, torch.float32)
    assert output.dtype == torch.float32
    expected = int8_reference.linear(x, codes, scales, bias, torch.float64)
    error = (output.double() - expected) / scales.clamp(min=1e-30)  # in units of int8
    assert error.abs().max() <= 2e-5 * 127 * shape[1] ** 0.5
    assert torch.equal(linear(x, matrix, bias, None), output.bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_the_reference_s(shape: tuple[int, int]) -> None:
    weight = random_weight(shape, 1)
    codes, scales = int8_reference.quantize(weight)
    matrix = packed(weight)
    assert torch.equal(matrix.scales, scales)
    assert torch.equal(
        embedding(torch.arange(shape[0]), matrix), int8_reference.embedding(torch.arange(shape[0]), codes, scales)
    )
    # With inputs that pick one column, the product is the code itself.
    picked = linear(torch.eye(shape[1])[:300].bfloat16(), matrix, None, torch.float32)
    assert torch.equal(picked, (codes.float() * scales[:, None]).T[:300])


def test_the_error_of_a_weight_is_half_a_step() -> None:
    weight = random_weight((300, 200), 2)
    codes, scales = int8_reference.quantize(weight)
    assert ((codes * scales[:, None] - weight.float()).abs() <= 0.5001 * scales[:, None]).all()
    assert (codes.abs().amax(1) == 127).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_keep_their_bits(shape: tuple[int, int]) -> None:
    """Whatever the number of rows, their place among them, and the number of threads."""
    generator = torch.Generator().manual_seed(3)
    matrix, x = packed(random_weight(shape, 3)), torch.randn(300, shape[1], generator=generator).bfloat16()
    bias = torch.randn(shape[0]).bfloat16()
    expected = linear(x, matrix, bias, torch.float32)
    counts = [1, 2, 3, 4, 5, 6, 7, 8, 13, 64, 255, *torch.randint(1, 300, (5,), generator=generator).tolist()]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for first, last in [(0, count) for count in counts] + [(3, 4), (7, 300)]:
            assert torch.equal(linear(x[first:last], matrix, bias, torch.float32), expected[first:last])


def test_every_code() -> None:
    """In both places of a pair: nothing is rounded, whatever instructions read it."""
    weight = torch.stack([torch.arange(-127, 128), torch.arange(-127, 128).roll(1)]).bfloat16()
    matrix = packed(weight)
    x = torch.eye(255).bfloat16()
    assert torch.equal(linear(x, matrix, None, torch.float32), weight.T.float())
    assert torch.equal(embedding(torch.tensor([1, 0]), matrix), weight[[1, 0]])


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    weight = random_weight((70, 33), 4)
    expected = linear(torch.ones(2, 33).bfloat16(), packed(weight), None, torch.float32)
    weight[3] = 0
    weight[5, 7] = torch.nan
    weight[68, 32] = -torch.inf
    output = linear(torch.ones(2, 33).bfloat16(), packed(weight), None, torch.float32)
    assert (output[:, 3] == 0).all()
    assert output[:, [5, 68]].isnan().all()
    healthy = [column for column in range(70) if column not in {3, 5, 68}]
    assert torch.equal(output[:, healthy], expected[:, healthy])
    codes, scales = int8_reference.quantize(weight)
    assert scales[3] == 0
    assert scales[[5, 68]].isnan().all()
    assert not codes[[3, 5, 68]].any()


def test_bad_rows_stay_alone() -> None:
    matrix, x = packed(random_weight((70, 33), 5)), torch.randn(9, 33).bfloat16()
    expected = linear(x, matrix, None, None)
    x[4] = torch.nan
    output = linear(x, matrix, None, None)
    assert output[4].isnan().all()
    healthy = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(output[healthy], expected[healthy])


def test_strided_rows_and_no_rows() -> None:
    matrix, x = packed(random_weight((70, 20), 6)), torch.randn(9, 64).bfloat16()
    assert torch.equal(linear(x[:, 5:25], matrix, None, None), linear(x[:, 5:25].contiguous(), matrix, None, None))
    assert linear(x[:0, :20], matrix, None, None).shape == (0, 70)
    wide = random_weight((40, 64), 7)
    assert torch.equal(packed(wide[:, 5:25]).blocks, packed(wide[:, 5:25].contiguous()).blocks)


def test_parts_of_a_weight_give_the_bits_of_the_whole() -> None:
    matrix, x, bias = packed(random_weight((199, 47), 8)), torch.randn(9, 47).bfloat16(), torch.randn(199).bfloat16()
    parts = split(matrix, 128)
    assert parts is not None
    products = [linear(x, part, own, None) for part, own in zip(parts, bias.split([128, 71]), strict=True)]
    assert torch.equal(torch.cat(products, 1), linear(x, matrix, bias, None))
    assert split(matrix, 100) is None


def test_without_native_kernels_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuantizationError, match=r"here: reference \(cpu float32\)"):
        pack(torch.ones(3, 4), quantization="int8")
    monkeypatch.setenv("BATON_KERNELS", "reference")
    forget()
    with pytest.raises(QuantizationError, match=r"here: reference \(BATON_KERNELS\)"):
        pack(torch.ones(3, 4, dtype=torch.bfloat16), quantization="int8")
    assert not library.available()
