"""What happens once a launched step has run: timings, result, or a fault of the device."""

import queue
import threading
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from executor_service.step_output import StepOutput
from executor_service.step_plan import Fault, FaultCode, StepResult, StepTimings

MAX_LAUNCHED_STEPS = 2

_NO_STATUS = np.zeros(0, np.uint8)


class ResultSink(Protocol):
    """Where results and faults go: the link."""

    def result(self, epoch: int, result: StepResult) -> None:
        """Send a step's result."""

    def fault(self, epoch: int, fault: Fault) -> None:
        """Report that nothing more of ``epoch`` will be applied."""


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedStep:
    """A step on the device. Times are ``time.monotonic`` seconds; ``after_idle`` also marks the first of an epoch."""

    epoch: int
    step_id: int
    output: StepOutput
    arrived_at: float
    launched_at: float
    plans_queued: int
    after_idle: bool


class Completer(Protocol):
    """Takes launched steps and sees to their results."""

    def submit(self, step: LaunchedStep) -> None:
        """Take over ``step``; returns when the next one may be launched."""


class InlineCompleter:
    """Completes a step in the calling thread. Of an error one of the ``num_begun`` steps after it may be the cause."""

    def __init__(self, sink: ResultSink, num_begun: int = 0) -> None:
        self._sink = sink
        self._num_begun = num_begun
        self._device_free_at = 0.0

    def submit(self, step: LaunchedStep) -> None:
        """Wait for the step's tokens and send them."""
        try:
            output = step.output.wait()
        except Exception as error:  # whatever an asynchronous kernel raised
            self._sink.fault(step.epoch, fault_of(step.step_id + self._num_begun, error))
            return
        done_at = time.monotonic()
        # a plan that arrived before the last step was done never kept the device waiting
        starved = 0.0 if step.after_idle else max(0.0, step.arrived_at - self._device_free_at)
        began_at = max(step.launched_at, self._device_free_at)
        self._device_free_at = done_at
        timings = StepTimings(
            queued_us=_microseconds(step.launched_at - step.arrived_at),
            device_us=_microseconds(done_at - began_at),
            starved_us=_microseconds(starved),
            plans_queued=step.plans_queued,
        )
        result = StepResult(
            step_id=step.step_id,
            token_ids=output.token_ids,
            row_status=_NO_STATUS if output.row_ok.all() else (~output.row_ok).astype(np.uint8),
            timings=timings,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            audited_tokens=output.audited_tokens,
            audit_mismatch_rows=output.audit_mismatch_rows,
            grammar_ended=output.grammar_ended,
        )
        self._sink.result(step.epoch, result)


class ThreadCompleter:
    """Completes steps in order in a thread of its own, so that the main thread can launch the next one meanwhile."""

    def __init__(self, sink: ResultSink) -> None:
        self._sink = sink
        # A device that has failed answers every wait with the error, also that for a step before the faulty one.
        self._inline = InlineCompleter(sink, num_begun=MAX_LAUNCHED_STEPS - 1)
        self._steps: queue.SimpleQueue[LaunchedStep] = queue.SimpleQueue()
        self._may_launch = threading.Semaphore(MAX_LAUNCHED_STEPS - 1)
        threading.Thread(target=self._run, name="copy-wait", daemon=True).start()

    def submit(self, step: LaunchedStep) -> None:
        """Queue the step; returns when another one may be launched."""
        self._steps.put(step)
        self._may_launch.acquire()

    def _run(self) -> None:
        while True:
            step = self._steps.get()
            try:
                self._inline.submit(step)
            except BaseException as error:  # else this thread would end in silence, and the main thread wait for ever
                self._sink.fault(step.epoch, fault_of(step.step_id, error))
            finally:
                self._may_launch.release()


def fault_of(step_id: int, error: BaseException) -> Fault:
    """The fault that an exception from the model amounts to."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
    code = FaultCode.OUT_OF_MEMORY if out_of_memory else FaultCode.DEVICE_ERROR
    first_line = (str(error).splitlines() or [""])[0]
    return Fault(step_id, code, f"{type(error).__name__}: {first_line}")


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
