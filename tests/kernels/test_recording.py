"""Recorded work, repeated on new values: what is read anew, what memory is shared, what is refused."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels.linear import linear, pack
from kernels.native import library
from kernels.native.library import available
from kernels.native.memory import Scratch
from kernels.native.recording import NotRepeatableError, Recording, record
from kernels.rms_norm import add_rms_norm

needs_native = pytest.mark.skipif(not available(), reason="no native kernels")


def recorded(work: Callable[[], Tensor], scratch: Scratch) -> Recording:
    return record(lambda: (work(),), scratch)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@needs_native
@pytest.mark.parametrize("known", [True, False])
@torch.inference_mode()
def test_native_calls_and_torch_operations_are_repeated_in_order(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also call by call, where C++ does not know the types of one."""
    if not known:
        monkeypatch.setattr(library, "signature", lambda letters: 0)
    x, weight, norm = randn(3, 64), pack(randn(96, 64)), randn(64)

    def work() -> Tensor:
        normed, total = add_rms_norm(x, x, norm, 1e-6)
        gate, up = linear(normed, weight, None, None).unflatten(1, (2, 48)).unbind(1)
        return linear((gate * up).add_(1).repeat(1, 2)[:, :64], weight, None, torch.float32) + total.sum()

    scratch = Scratch()
    recording = recorded(work, scratch)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        assert scratch.is_idle  # the recording does not hold what operations of torch read
        assert torch.equal(recording.run()[0], work())


@needs_native
@torch.inference_mode()
def test_a_recording_keeps_the_memory_of_results_that_it_does_not_return() -> None:
    x, weight, scratch = randn(3, 64), pack(randn(64, 64)), Scratch()
    held = weakref.ref(scratch)
    recording = recorded(lambda: linear(linear(x, weight, None, None), weight, None, None).sum(), scratch)
    del scratch
    assert held() is not None
    del recording
    assert held() is None


def test_a_recording_keeps_what_torch_gave_it() -> None:
    x = torch.arange(3.0)

    def work() -> Tensor:
        held = torch.empty(3)
        held.copy_(x)
        return held * 2

    recording = recorded(work, Scratch())
    torch.empty(3).fill_(9)  # would be where ``held`` was, were it free
    x += 1
    assert recording.run()[0].tolist() == [2, 4, 6]


def test_nothing_is_done_before_the_recording_runs() -> None:
    x = torch.zeros(3)
    recording = recorded(lambda: x.add_(1), Scratch())
    assert x.tolist() == [0, 0, 0]
    assert recording.run()[0] is x
    assert x.tolist() == [1, 1, 1]


@needs_native
@torch.inference_mode()
def test_calls_of_another_thread_are_not_recorded() -> None:
    """They are made, and nobody else makes them again."""
    x, weight = randn(3, 64), pack(randn(96, 64))
    notes: list[str] = []
    expected = linear(x, weight, None, None)
    with library.noting(lambda function, _: notes.append(function.name)), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(linear, x, weight, None, None).result(), expected)
        assert notes == []
        linear(x, weight, None, None)
        assert notes == ["baton_linear"]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        torch.nonzero,
        lambda x: x + torch.rand(3),
        lambda x: x.sort()[0],
        lambda x: torch.frexp(x, out=(torch.empty(3), torch.empty(3, dtype=torch.int32)))[0],
    ],
)
def test_what_cannot_be_repeated_is_refused(work: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(3.0)
    with pytest.raises(NotRepeatableError, match="aten"):
        recorded(lambda: work(x), Scratch())
