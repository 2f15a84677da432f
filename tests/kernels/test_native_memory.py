"""Memory in huge pages is memory like any other; results keep theirs for as long as they are used."""

import gc
import random
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels.native.memory import Scratch, empty, results_in, zeros


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


def test_memory_is_used_again_but_never_while_a_tensor_uses_it() -> None:
    scratch = Scratch()
    first = scratch.empty((4, 5), torch.bfloat16)
    address = first.data_ptr()
    assert (first.shape, first.dtype, address % 64) == ((4, 5), torch.bfloat16, 0)
    part = first[1:].view(torch.int16)
    del first
    assert scratch.empty((4, 5), torch.bfloat16).data_ptr() != address
    del part
    assert scratch.is_idle
    assert scratch.empty((2, 7), torch.float32).data_ptr() == address


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)], ids=str)
def test_any_shape_has_a_place_of_its_own(shape: tuple[int, ...]) -> None:
    scratch = Scratch()
    made = [scratch.empty(shape, torch.float32) for _ in range(3)]
    assert [tensor.shape for tensor in made] == [torch.Size(shape)] * 3
    del made
    assert scratch.is_idle


def test_results_keep_their_values_whatever_else_comes_and_goes() -> None:
    """Of any size, kept for any time, some of them given up on other threads; memory stays within its bound."""
    chosen, scratch = random.Random(0), Scratch()
    kept: list[tuple[Tensor, int]] = []
    most = 0
    with ThreadPoolExecutor(1) as pool:
        for number in range(2000):
            rows = chosen.choice([1, 70, 5000, 40_000, 1 << 20])
            kept.append((scratch.empty((rows, 2), torch.uint8), number % 251))
            kept[-1][0][:: rows - 1 or 1] = number % 251
            most = max(most, sum(tensor.nbytes for tensor, _ in kept))
            chosen.shuffle(kept)
            dropped, kept = kept[12:], kept[: chosen.choice([12, 12, 12, 11, 6])]
            assert all((tensor[:: len(tensor) - 1 or 1] == value).all() for tensor, value in dropped)
            pool.submit(dropped.clear).result()
    assert most > 8 << 20
    assert scratch.size <= 2 * most
    kept.clear()
    assert scratch.is_idle


def test_a_tensor_without_claim_is_the_same_but_its_memory_is_free() -> None:
    scratch = Scratch()
    strided = scratch.empty((6, 8), torch.float32).copy_(torch.arange(48).view(6, 8))[1:, ::2]
    free = scratch.without_claim(strided)
    assert torch.equal(free, strided)
    strided += 1
    assert torch.equal(free, strided)
    assert not scratch.is_idle
    del strided
    assert scratch.is_idle
    assert scratch.empty((6, 8), torch.float32).data_ptr() == free.untyped_storage().data_ptr()
    foreign = torch.ones(3)
    assert scratch.without_claim(foreign) is foreign


def test_each_thread_has_its_own_scratch_or_none() -> None:
    outer, inner = Scratch(), Scratch()
    with results_in(outer), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(empty, (4, 4), torch.bfloat16).result()
        assert (outer.is_idle, elsewhere.shape) == (True, (4, 4))
        with results_in(inner):
            own = empty((4, 4), torch.bfloat16)
            assert (outer.is_idle, inner.is_idle) == (True, False)
        own = empty((4, 4), torch.bfloat16)
        assert (outer.is_idle, inner.is_idle) == (False, True)
    assert own.shape == (4, 4)


def test_what_was_touched_has_its_pages() -> None:
    scratch = Scratch()
    scratch.empty((1 << 26,), torch.uint8)
    scratch.touch()
    again = scratch.empty((1 << 26,), torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    again.fill_(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 16  # else one per huge page, at least
