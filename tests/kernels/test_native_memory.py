"""Memory in huge pages is memory like any other."""

import gc

import pytest
import torch

from kernels.native.memory import zeros


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (1 << 20,), (3, 700_001)], ids=str)
def test_shape_and_contents(shape: tuple[int, ...]) -> None:
    tensors = [zeros(shape, torch.bfloat16) for _ in range(3)]
    for value, tensor in enumerate(tensors):
        assert not tensor.any()
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, torch.bfloat16, True)
        tensor.fill_(value)
    gc.collect()
    for value, tensor in enumerate(tensors):
        assert (tensor == value).all()


@pytest.mark.parametrize("size", [1 << 50, 1 << 70])
def test_want_of_memory_is_an_error_of_its_own(size: int) -> None:
    with pytest.raises(MemoryError, match=str(size)):
        zeros((size,), torch.uint8)


def test_large_memory_starts_on_a_huge_page() -> None:
    assert zeros((2 << 20,), torch.uint8).data_ptr() % (2 << 20) == 0
