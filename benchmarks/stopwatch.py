"""Where the time of an executor's step goes: kernels' entry points and the stages of a step, wrapped from outside."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from executor_service import model_runner, sampler
from executor_service.batch_builder import BatchBuilder
from executor_service.executor import StepLauncher
from executor_service.plan_applier import PlanApplier
from executor_service.row_state import RowState
from executor_service.step_output import HostStepOutput
from kernels.native.library import NativeFunction
from kernels.native.recording import NativeCalls

STAGES: Mapping[str, tuple[tuple[Any, str], ...]] = {
    "plan": ((PlanApplier, "apply"),),
    "inputs": ((BatchBuilder, "build"),),
    "between kernels": ((model_runner.ModelRunner, "run"),),
    "around sampling": ((sampler, "sample"),),
    "results": ((RowState, "record"), (HostStepOutput, "wait")),
    "between stages": ((StepLauncher, "launch"),),
}
"""What Python does in a step, by the functions that do it; each without the kernels and stages within."""

_KINDS = {
    "rms_norm": "norms",
    "silu": "activation",
    "rotary": "rotary, append",
    "append": "rotary, append",
    "attention": "attention",
    "sample": "sampling",
}


class Stopwatch:
    """Microseconds and calls of one step after another, by kind; while it is off, a wrapper costs a comparison."""

    def __init__(self) -> None:
        self.weights: dict[int, str] = {}  # kinds of matrix products, by an address among their arguments
        self._is_on = False
        self._nested: list[int] = []  # nanoseconds within the running calls, the outermost first
        self._times: defaultdict[str, int] = defaultdict(int)
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._overhead = 0  # nanoseconds that a timed call costs the caller besides
        self._overhead = self._calibrate()

    def step(self, work: Callable[[], object]) -> tuple[dict[str, float], dict[str, int]]:
        """Run ``work``; microseconds and calls of each kind within it."""
        self._times.clear()
        self._calls.clear()
        self._is_on = True
        try:
            work()
        finally:
            self._is_on = False
        return {kind: time / 1e3 for kind, time in self._times.items()}, dict(self._calls)

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, the time of which counts as ``kind``, without that of timed functions that it calls."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._is_on:
                return function(*args, **kwargs)
            self._nested.append(0)
            began = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter_ns() - began
                self._times[kind] += elapsed - self._nested.pop()
                self._calls[kind] += 1
                if self._nested:
                    self._nested[-1] += elapsed + self._overhead

        return run

    def kind_of(self, name: str, arguments: Sequence[Any]) -> str:
        """What a native call is for: which matrix it multiplies by, or what its name says."""
        if "rows" in name:  # of the head's weight, where they share one
            return "embedding"
        for argument in arguments:
            if isinstance(argument, int) and argument in self.weights:
                return self.weights[argument]
        return next((kind for part, kind in _KINDS.items() if part in name), name)

    def _calibrate(self) -> int:
        nothing, turns = self.timed("nothing", lambda: None), range(1000)

        def call_it() -> None:
            for _ in turns:
                nothing()

        caller = self.timed("caller", call_it)
        return round(min(self.step(caller)[0]["caller"] for _ in range(10)) * 1e3 / len(turns))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Time what runs within the ``with`` block, recordings too."""
        call, replay = NativeFunction.call, NativeCalls.__call__

        def timed_call(function: NativeFunction, *arguments: float | None) -> None:
            timed = self.timed(self.kind_of(function.name, arguments), call) if self._is_on else call
            timed(function, *arguments)

        def timed_replay(calls: NativeCalls) -> None:
            if not self._is_on:
                replay(calls)
                return
            began = time.perf_counter_ns()
            timed = [self.timed(self.kind_of(one.name, words), make) for one, words, make in calls.one_by_one()]
            self._nested[-1] += time.perf_counter_ns() - began  # nothing that a step does
            for make in timed:
                make()

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(NativeFunction, "call", timed_call))
            stack.enter_context(mock.patch.object(NativeCalls, "__call__", timed_replay))
            for kind, functions in STAGES.items():
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self.timed(kind, getattr(owner, name))))
            yield
