"""Triton's batch-invariant linear, interpreted: right, and the same bits for a row whatever else there is."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.gpu import library
from kernels.linear import InvariantMatrix, embedding, gpu, linear, pack

TILES = [gpu.Tile(16, 16, 32), gpu.Tile(32, 64, 32), gpu.Tile(64, 32, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(70, 50, 100), (1, 33, 64), (17, 130, 37)])
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    m, n, k = shape
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((m, k), (n, k), (n,)))
    expected = x.double() @ weight.double().T + bias.double()
    for tile in (*TILES, None):
        output = gpu.linear(x, weight, bias, torch.float32, tile)
        torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-4)
        assert torch.equal(gpu.linear(x, weight, bias, dtype, tile), output.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", TILES)
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype, tile: gpu.Tile) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(150, 90).to(dtype), torch.randn(70, 90).to(dtype)
    expected = gpu.linear(x, weight, None, torch.float32, tile)
    assert torch.equal(expected, gpu.linear(x, weight, None, torch.float32, TILES[0]))
    for first, last in ((0, 1), (37, 38), (5, 22), (60, 150)):
        assert torch.equal(gpu.linear(x[first:last], weight, None, torch.float32, tile), expected[first:last])
    order = torch.randperm(150)
    assert torch.equal(gpu.linear(x[order], weight, None, torch.float32, tile), expected[order])


def test_the_tile_knows_nothing_of_rows() -> None:
    assert [gpu.tile_of(columns, 2).columns for columns in (1024, 2048, 4096, 151_936)] == [32, 32, 64, 128]


def test_packing_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton runs and exactness is asked for; ids are looked up in the same weight."""
    weight, x = torch.randn(20, 32), torch.randn(3, 32)
    assert pack(weight, exact=True) is weight
    monkeypatch.setattr(library, "interpreted", lambda: True)
    assert pack(weight) is weight
    matrix = pack(weight, exact=True)
    assert isinstance(matrix, InvariantMatrix)
    assert torch.equal(linear(x, matrix, None, None), gpu.linear(x, weight, None, torch.float32))
    assert torch.equal(embedding(torch.tensor([3, 0]), matrix), weight[[3, 0]])
