"""Native linear layers against float64, and their bits against the number of rows and threads."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.linear import PackedMatrix, add_linear, embedding, linear, linear_silu_and_mul, pack, split
from kernels.native import build

from .test_native_build import ISAS, use_isa

SHAPES = [(1, 1), (3, 5), (64, 2), (65, 33), (130, 48), (199, 47), (1000, 512), (80, 4097), (129, 9001)]
EMULATED_AMX = "avx512_bf16 and emulated amx"


@pytest.fixture(autouse=True, params=[*ISAS, EMULATED_AMX])
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == EMULATED_AMX:
        emulate_amx(monkeypatch)
    yield from use_isa(monkeypatch, request.param.partition(" ")[0])


def emulate_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for AMX, with plain C++ for its instructions."""
    header = Path(__file__).with_name("amx_emulation.h")
    version = hashlib.sha256(header.read_bytes()).hexdigest()  # the library's name depends on the flags
    flags = (*build._ISA_FLAGS["avx512_bf16"], "-D__AMX_BF16__", f"-DVERSION={version}", "-include", str(header))
    monkeypatch.setattr(build, "_isa_flags", lambda _isa: flags)
    sources = [source for source in build._sources() if source.parent.name in {"linear", "activation"}]
    monkeypatch.setattr(build, "_sources", lambda: sources)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(weight: Tensor) -> PackedMatrix:
    matrix = pack(weight)
    assert isinstance(matrix, PackedMatrix)
    return matrix


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_against_float64(shape: tuple[int, int], with_bias: bool) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    weight, x = torch.randn(shape).bfloat16(), torch.randn(301, columns).bfloat16()
    bias = torch.randn(rows).bfloat16() if with_bias else None
    wide = None if bias is None else bias.double()
    expected = torch.nn.functional.linear(x.double(), weight.double(), wide)
    output = linear(x, packed(weight), bias, torch.float32)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5 * columns**0.5)
    assert torch.equal(linear(x, packed(weight), bias, None), output.bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_keep_their_bits(shape: tuple[int, int]) -> None:
    """Whatever the number of rows, their place among them, and the number of threads."""
    torch.manual_seed(1)
    matrix, x = packed(torch.randn(shape).bfloat16()), torch.randn(300, shape[1]).bfloat16()
    bias = torch.randn(shape[0]).bfloat16()
    expected = linear(x, matrix, bias, torch.float32)
    counts = (1, 2, 3, 4, 5, 6, 7, 8, 13, 64, 191, 192, 193, 255)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for first, last in [(0, count) for count in counts] + [(3, 4), (7, 300)]:
            assert torch.equal(linear(x[first:last], matrix, bias, torch.float32), expected[first:last])


@pytest.mark.parametrize("shape", [(1, 1), (16, 6), (33, 5), (130, 48), (97, 2051)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_gated_has_the_bits_of_its_parts(shape: tuple[int, int], with_bias: bool) -> None:
    """Whatever the number of rows, their place among them, and the number of threads."""
    torch.manual_seed(6)
    size, columns = shape
    weight, x = torch.randn(2 * size, columns).bfloat16(), torch.randn(301, columns + 3).bfloat16()[:, :columns]
    bias = torch.randn(2 * size).bfloat16() if with_bias else None
    expected = silu_and_mul(linear(x, packed(weight), bias, None))
    matrix = pack(weight, gated=True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for first, last in [(0, 301), (0, 1), (2, 7), (5, 11), (9, 73), (4, 4)]:
            assert torch.equal(linear_silu_and_mul(x[first:last], matrix, bias), expected[first:last])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_adding_in_place_has_the_bits_of_a_sum(shape: tuple[int, int], with_bias: bool) -> None:
    """Whatever the number of rows, their place among them, and the number of threads; nothing else is written."""
    torch.manual_seed(8)
    rows, columns = shape
    matrix, x = packed(torch.randn(shape).bfloat16()), torch.randn(301, columns).bfloat16()
    bias = torch.randn(rows).bfloat16() if with_bias else None
    before = torch.randn(301, rows + 5).bfloat16() * 9
    expected = before.clone()
    expected[:, 2 : rows + 2] += linear(x, matrix, bias, None)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for first, last in [(0, 301), (0, 1), (2, 7), (5, 11), (9, 73), (4, 4)]:
            total = before[first:last].clone()
            assert add_linear(x[first:last], matrix, bias, total[:, 2 : rows + 2])
            assert torch.equal(total, expected[first:last])


def test_a_plain_weight_leaves_adding_to_the_norm() -> None:
    total = torch.ones(2, 3).bfloat16()
    assert not add_linear(torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16(), None, total)
    assert torch.equal(total, torch.ones(2, 3).bfloat16())


def test_only_the_gated_product_reads_a_gated_weight() -> None:
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with pytest.raises(ValueError, match="linear_silu_and_mul"):
        linear(x, pack(weight, gated=True), None, None)
    with pytest.raises(ValueError, match="linear_silu_and_mul"):
        add_linear(x, pack(weight, gated=True), None, torch.zeros(2, 4).bfloat16())
    assert torch.equal(
        linear_silu_and_mul(x, packed(weight), None), silu_and_mul(linear(x, packed(weight), None, None))
    )


def test_bad_rows_stay_alone() -> None:
    torch.manual_seed(2)
    matrix, x = packed(torch.randn(70, 33).bfloat16()), torch.randn(9, 33).bfloat16()
    expected = linear(x, matrix, None, None)
    x[4] = torch.nan
    x[7, 32] = torch.inf
    output = linear(x, matrix, None, None)
    assert output[4].isnan().all()
    assert not output[7].isfinite().any()
    healthy = [0, 1, 2, 3, 5, 6, 8]
    assert torch.equal(output[healthy], expected[healthy])


def test_calls_from_many_threads_at_once() -> None:
    """One of them has the pool of threads, the others do without; forked processes have none."""
    torch.manual_seed(5)
    matrix, x = packed(torch.randn(1000, 512).bfloat16()), torch.randn(30, 512).bfloat16()
    expected = linear(x, matrix, None, None)
    with ThreadPoolExecutor(4) as callers:
        for output in callers.map(lambda _: linear(x, matrix, None, None), range(400)):
            assert torch.equal(output, expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x, matrix, None, None), expected) else 1)
    assert os.waitpid(child, 0) == (child, 0)


def test_strided_rows_and_no_rows() -> None:
    torch.manual_seed(3)
    matrix, x = packed(torch.randn(70, 20).bfloat16()), torch.randn(9, 64).bfloat16()
    assert torch.equal(linear(x[:, 5:25], matrix, None, None), linear(x[:, 5:25].contiguous(), matrix, None, None))
    assert linear(x[:0, :20], matrix, None, None).shape == (0, 70)


@pytest.mark.parametrize("rows", [1, 70])
def test_parts_of_a_weight_give_the_bits_of_the_whole(rows: int) -> None:
    torch.manual_seed(5)
    weight, x, bias = torch.randn(199, 47).bfloat16(), torch.randn(rows, 47).bfloat16(), torch.randn(199).bfloat16()
    matrix = packed(weight)
    parts = split(matrix, 128)
    assert parts is not None
    products = [linear(x, part, own, None) for part, own in zip(parts, bias.split([128, 71]), strict=True)]
    assert torch.equal(torch.cat(products, 1), linear(x, matrix, bias, None))
    assert split(matrix, 100) is None  # amid a block
    assert split(pack(weight[:128], gated=True), 64) is None
    assert split(weight, 128) is None  # torch's bits depend on the shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_come_out_of_the_weight_packed_or_plain(shape: tuple[int, int]) -> None:
    torch.manual_seed(4)
    weight = torch.randn(shape).bfloat16()
    ids = torch.randint(0, shape[0], (50,))
    for matrix in (packed(weight), weight, weight.T.contiguous().T):
        assert torch.equal(embedding(ids, matrix), weight[ids])
