"""Native linear layers against float64, and their bits against the number of rows and threads."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels.linear import PackedMatrix, embedding, linear, pack

from .test_native_build import ISAS, use_isa

SHAPES = [(1, 1), (3, 5), (64, 2), (65, 33), (130, 48), (199, 47), (1000, 512), (80, 4097), (129, 9001)]


@pytest.fixture(autouse=True, params=ISAS)
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from use_isa(monkeypatch, request.param)


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
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for first, last in [(0, count) for count in (1, 2, 3, 4, 5, 6, 7, 8, 13, 64, 255)] + [(3, 4), (7, 300)]:
            assert torch.equal(linear(x[first:last], matrix, bias, torch.float32), expected[first:last])


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_come_out_of_the_packed_weight(shape: tuple[int, int]) -> None:
    torch.manual_seed(4)
    weight = torch.randn(shape).bfloat16()
    ids = torch.randint(0, shape[0], (50,))
    assert torch.equal(embedding(ids, packed(weight)), weight[ids])
