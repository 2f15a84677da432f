"""Work recorded for all sizes: each gives what the work itself does; what has no such recording is refused."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.linear import PackedMatrix, linear, pack
from kernels.native.library import available
from kernels.native.memory import Scratch
from kernels.native.recording import NotRepeatableError
from kernels.native.sized_recording import record_sized
from kernels.rms_norm import add_rms_norm

pytestmark = pytest.mark.skipif(not available(), reason="no native kernels")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("most", [(64, 7), (64, 1), (1, 1), (96, 48)], ids=str)
@torch.inference_mode()
def test_every_size_gives_what_the_work_does(most: tuple[int, int]) -> None:
    """Also where a size equals one of the work's own (48, 64)."""
    x, y, norm, weight = randn(most[0], 64), randn(most[1], 64), randn(64), pack(randn(64, 64))

    def work(rows: int, others: int) -> tuple[Tensor, Tensor | None, Tensor]:
        linear(y[:others], weight, None, None)
        normed, total = add_rms_norm(linear(x[:rows], weight, None, None), x[:rows], norm, 1e-6)
        return linear(normed, weight, None, torch.float32), None, total

    scratch = Scratch()
    recording = record_sized(work, most, scratch)
    assert scratch.is_idle
    held = scratch.size
    for rows in range(1, most[0] + 1):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(rows)))
        others = 1 + rows % most[1]
        for ours, expected in zip(recording.run(rows, others), work(rows, others), strict=True):
            assert expected is None if ours is None else torch.equal(ours, expected)
    assert scratch.size == held


@torch.inference_mode()
def test_a_recording_keeps_the_memory_of_its_results() -> None:
    x, weight, scratch = randn(5, 64), pack(randn(64, 64)), Scratch()
    held = weakref.ref(scratch)
    recording = record_sized(lambda rows: (linear(x[:rows], weight, None, None),), [5], scratch)
    del scratch
    assert held() is not None
    del recording
    assert held() is None


@torch.inference_mode()
def test_results_are_known_before_they_are_filled() -> None:
    x, weight = randn(5, 64), pack(randn(64, 64))
    recording = record_sized(lambda rows: (linear(x[:rows], weight, None, None),), [5], Scratch())
    (early,) = recording.results(3)
    (late,) = recording.run(3)
    assert early.data_ptr() == late.data_ptr() and torch.equal(early, linear(x[:3], weight, None, None))


def add_one(x: Tensor, weight: PackedMatrix, rows: int) -> Tensor:
    return x[:rows] + 1


def as_often_as_rows(x: Tensor, weight: PackedMatrix, rows: int) -> Tensor:
    for _ in range(rows):
        x = linear(x, weight, None, None)
    return x


def square_of_rows(x: Tensor, weight: PackedMatrix, rows: int) -> Tensor:
    return linear(x[: rows * rows], weight, None, None)


@pytest.mark.parametrize(
    ("work", "why"),
    [(add_one, "only call native functions"), (as_often_as_rows, "other calls"), (square_of_rows, "not affine")],
)
@torch.inference_mode()
def test_what_has_no_recording_for_all_sizes_is_refused(
    work: Callable[[Tensor, PackedMatrix, int], Tensor], why: str
) -> None:
    x, weight = randn(64, 64), pack(randn(64, 64))
    assert isinstance(weight, PackedMatrix)
    with pytest.raises(NotRepeatableError, match=why):
        record_sized(lambda rows: (work(x, weight, rows),), [8], Scratch())
