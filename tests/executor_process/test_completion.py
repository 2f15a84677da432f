"""Results of launched steps, completed inline (CPU) and in the copy-wait thread (CUDA)."""

import queue
import threading
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from executor_service.completion import Completer, InlineCompleter, LaunchedStep, ThreadCompleter
from executor_service.sampler import SampledTokens
from executor_service.step_output import HostStepOutput, StepOutput
from executor_service.step_plan import Fault, FaultCode, Int32s, StepResult, UInt8s
from executor_service.step_report import HostOutput, StepReport


class Sink:
    """Collects what would be sent; the results of ``refused`` steps cannot be."""

    def __init__(self, refused: int = 0) -> None:
        self.sent: queue.Queue[tuple[int, StepResult | Fault]] = queue.Queue()
        self._refused = refused

    def result(self, epoch: int, result: StepResult) -> None:
        if result.step_id == self._refused:
            raise MemoryError("no room for the result")
        self.sent.put((epoch, result))

    def fault(self, epoch: int, fault: Fault) -> None:
        self.sent.put((epoch, fault))

    def next(self) -> StepResult:
        item = self.sent.get(timeout=5)[1]
        assert isinstance(item, StepResult)
        return item


class Gate:
    """A step's output that is there when the gate opens."""

    def __init__(self, seconds: float = 0.0, error: BaseException | None = None) -> None:
        self.opened = threading.Event()
        self._seconds = seconds
        self._error = error

    def wait(self) -> HostOutput:
        if self._seconds:
            time.sleep(self._seconds)
        else:
            assert self.opened.wait(5)
        if self._error:
            raise self._error
        return HostOutput(np.array([5], np.int32), np.array([True]))


def launched(step_id: int, output: StepOutput, *, arrived_at: float = 0.0, after_idle: bool = False) -> LaunchedStep:
    now = time.monotonic()
    return LaunchedStep(3, step_id, output, arrived_at or now, now, 2, after_idle)


@pytest.fixture(params=[InlineCompleter, ThreadCompleter])
def pair(request: pytest.FixtureRequest) -> tuple[Completer, Sink]:
    sink = Sink()
    return request.param(sink), sink


def test_timings(pair: tuple[Completer, Sink]) -> None:
    completer, sink = pair
    completer.submit(launched(1, Gate(0.05), after_idle=True))
    first = sink.next().timings
    assert (first.starved_us, first.plans_queued) == (0, 2)
    assert first.device_us >= 50_000
    time.sleep(0.1)
    completer.submit(launched(2, Gate(0.01)))
    assert sink.next().timings.starved_us == pytest.approx(100_000, abs=50_000)
    completer.submit(launched(3, Gate(0.01), arrived_at=time.monotonic() - 0.2))
    third = sink.next().timings
    assert third.starved_us == 0
    assert third.queued_us >= 200_000


@pytest.mark.parametrize(("kind", "last_begun"), [(InlineCompleter, 1), (ThreadCompleter, 2)])
def test_error_of_the_device_is_a_fault_of_the_last_step_that_may_have_begun(
    kind: type[InlineCompleter] | type[ThreadCompleter], last_begun: int
) -> None:
    sink = Sink()
    completer = kind(sink)
    completer.submit(launched(1, Gate(0.01, RuntimeError("illegal access"))))
    epoch, fault = sink.sent.get(timeout=5)
    assert isinstance(fault, Fault)
    assert (epoch, fault.step_id, fault.code) == (3, last_begun, FaultCode.DEVICE_ERROR)
    assert fault.message == "RuntimeError: illegal access"
    completer.submit(launched(2, Gate(0.01)))  # the completer itself goes on
    assert sink.next().step_id == 2


def test_two_steps_may_be_launched_and_results_keep_their_order() -> None:
    sink = Sink()
    completer = ThreadCompleter(sink)
    gates = [Gate() for _ in range(3)]
    completer.submit(launched(1, gates[0]))  # returns at once: a second one may be launched
    second = threading.Thread(target=completer.submit, args=(launched(2, gates[1]),))
    second.start()
    second.join(0.1)
    assert second.is_alive()  # a third one may not
    gates[1].opened.set()
    second.join(0.1)
    assert second.is_alive()
    gates[0].opened.set()
    second.join(5)
    assert [sink.next().step_id, sink.next().step_id] == [1, 2]


def test_host_output_marks_bad_rows() -> None:
    sink = Sink()
    tokens = SampledTokens(torch.tensor([4, 0, 6]), torch.tensor([True, False, True]))
    InlineCompleter(sink).submit(launched(1, HostStepOutput(tokens)))
    result = sink.next()
    assert (result.token_ids.tolist(), result.token_ids.dtype) == ([4, 0, 6], np.int32)
    assert result.row_status.tolist() == [0, 1, 0]


class Panic(BaseException):
    """As the grammar library raises them."""


@pytest.mark.parametrize(("refused", "error"), [(0, Panic("at the disco")), (1, None)], ids=["output", "result"])
def test_the_thread_survives_whatever_is_raised(refused: int, error: BaseException | None) -> None:
    sink = Sink(refused)
    completer = ThreadCompleter(sink)
    steps = threading.Thread(
        target=lambda: [completer.submit(launched(1, Gate(0.01, error))), completer.submit(launched(2, Gate(0.01)))],
        daemon=True,
    )
    steps.start()
    fault = sink.sent.get(timeout=5)[1]
    assert isinstance(fault, Fault) and fault.step_id == 1
    assert sink.next().step_id == 2
    steps.join(5)
    assert not steps.is_alive()


class _Broken:
    """Matchers that cannot take their tokens."""

    rows = np.zeros(1, np.int64)
    is_abandoned = False

    def fill(self) -> torch.Tensor:
        raise NotImplementedError

    def accept(self, token_ids: Int32s, row_ok: NDArray[np.bool_]) -> UInt8s:
        raise Panic("in a matcher")

    def abandon(self) -> None:
        self.is_abandoned = True


def test_matchers_that_cannot_take_their_tokens_are_given_up() -> None:
    """Else the main thread, which waits for them in the next step, would wait for ever."""
    masks = _Broken()
    output = HostStepOutput(SampledTokens(torch.tensor([4]), torch.tensor([True])), StepReport(masks=masks))
    with pytest.raises(Panic):
        output.wait()
    assert masks.is_abandoned
