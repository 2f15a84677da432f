"""Recorded work, repeated on new values: what is read anew, what memory is shared, what is refused."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.linear import linear, pack
from kernels.native import library
from kernels.native.library import available
from kernels.native.recording import NotRepeatableError, Scratch, record
from kernels.rms_norm import add_rms_norm

needs_native = pytest.mark.skipif(not available(), reason="no native kernels")


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

    recording = record(work, Scratch())
    assert torch.equal(recording.output, work())
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        recording.replay()
        assert torch.equal(recording.output, work())


def test_memory_is_used_again_but_never_while_a_tensor_uses_it() -> None:
    scratch = Scratch()
    first = scratch.empty((4, 5), torch.bfloat16)
    address = first.data_ptr()
    assert (first.shape, first.dtype, address % 64) == ((4, 5), torch.bfloat16, 0)
    part = first[1:].view(torch.int16)
    del first
    assert scratch.empty((4, 5), torch.bfloat16).data_ptr() != address
    del part
    assert {scratch.empty((2, 7), torch.float32).data_ptr() for _ in range(3)} >= {address}


def test_a_recording_keeps_what_it_reads() -> None:
    scratch = Scratch()
    x = torch.arange(3.0)

    def work() -> Tensor:
        held = torch.empty(3)
        held.copy_(x)
        return held * 2

    recording = record(work, scratch)
    scratch.empty((3,), torch.float32).fill_(9)  # would be where ``held`` was, were it free
    x += 1
    recording.replay()
    assert recording.output.tolist() == [2, 4, 6]


@needs_native
@torch.inference_mode()
def test_results_of_many_recordings_share_memory() -> None:
    """Each is valid until the next: a recording for each number of rows must not cost memory for all their logits."""
    x, weight = randn(8, 64), pack(randn(96, 64))
    scratch = Scratch()

    def work(rows: int) -> Tensor:
        return linear(linear(x[:rows], weight, None, None)[:, :64], weight, None, torch.float32)

    recordings = {rows: record(partial(work, rows), scratch) for rows in (6, 7, 8)}
    assert len({recording.output.data_ptr() for recording in recordings.values()}) == 1
    for rows in (8, 6, 7, 8):
        recordings[rows].replay()
        assert torch.equal(recordings[rows].output, work(rows))


@needs_native
@torch.inference_mode()
def test_calls_of_another_thread_are_not_recorded() -> None:
    """Their memory is gone when the recording is repeated."""
    x, weight = randn(3, 64), pack(randn(96, 64))
    notes: list[str] = []
    with library.observing(lambda function, _: notes.append(function.name)), ThreadPoolExecutor(1) as pool:
        pool.submit(linear, x, weight, None, None).result()
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
    ],
)
def test_what_cannot_be_repeated_is_refused(work: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(3.0)
    with pytest.raises(NotRepeatableError, match="aten"):
        record(lambda: work(x), Scratch())
