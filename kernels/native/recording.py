"""Work on a CPU as a list of native calls that can be repeated: what a CUDA graph is on a GPU.

While work is recorded, Python walks through it with a ``Scratch`` for its results, and native calls are noted with
their arguments. Then they are made, once or again and again, with nothing of Python in between: where kernels have
filled the processor's caches with weights, it takes ten times as long as in one go. Nor is there need of the GIL, which
other threads may want. Operations of torch that compute something are made in their turn, each through its dispatch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.native import library
from kernels.native.memory import Scratch, results_in

_REPLAY = library.NativeFunction("baton_replay", "pi")
Outputs = TypeVar("Outputs", bound=tuple[Tensor | None, ...])
_UNREPEATABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


class NotRepeatableError(RuntimeError):
    """The work asked for a value, for a shape that depends on values, for random numbers, for several new tensors in
    one operation, or for one that changes another argument than its first. See ``record_sized`` for more.
    """


class NativeCall(NamedTuple):
    """A native function, and the arguments that it got."""

    function: library.NativeFunction
    arguments: tuple[float | None, ...]


class Recording:
    """Calls in their order, the tensors that they fill, and the scratch in which all else lies that they fill. Of what
    they read it has only addresses.
    """

    def __init__(
        self, calls: Iterable[NativeCall | Callable[[], object]], outputs: tuple[Tensor, ...], scratch: Scratch
    ) -> None:
        self._scratch = scratch
        self._calls: list[Callable[[], object]] = []
        for is_native, group in groupby(calls, lambda call: isinstance(call, NativeCall)):
            some: list[Any] = list(group)
            self._calls += _joined(some) if is_native else some
        self._outputs = outputs

    def run(self) -> tuple[Tensor, ...]:
        """Make the calls, before anybody else uses the scratch; returns what the work returned."""
        for call in self._calls:
            call()
        return self._outputs


class NativeCalls:
    """Native calls, made in C++ with the GIL released from the first to the last."""

    def __init__(self, calls: Sequence[NativeCall], invokers: Mapping[library.NativeFunction, int]) -> None:
        """``invokers``: what ``baton_replay`` calls each function by."""
        each = [call.function.words(call.arguments) for call in calls]
        sizes = [len(one) for one in each]
        self.functions = [call.function for call in calls]
        # Of all calls, one after another; whoever changes them changes what the next run does.
        self.words = np.frombuffer(bytearray(b"".join(each)), np.int64)
        self._ends = np.cumsum(sizes)
        self._table = np.empty((len(calls), 3), np.uint64)
        addresses = {function: function.address() for function in invokers}
        self._table[:, 0] = [addresses[function] for function in self.functions]
        self._table[:, 1] = [invokers[function] for function in self.functions]
        self._table[:, 2] = self.words.ctypes.data + self._ends - sizes
        self._replay = _REPLAY.bind(self._table.ctypes.data, len(calls))

    def __call__(self) -> None:
        """Make them."""
        self._replay()

    def one_by_one(self) -> Iterator[tuple[library.NativeFunction, list[int], Callable[[], object]]]:
        """Function, words and the call itself of each."""
        ends = (self._ends // self.words.itemsize).tolist()
        row = self._table.strides[0]
        for i, (function, start, end) in enumerate(zip(self.functions, [0, *ends], ends, strict=False)):
            yield function, self.words[start:end].tolist(), _REPLAY.bind(self._table.ctypes.data + i * row, 1)


def join(calls: Sequence[NativeCall]) -> NativeCalls | None:
    """One call that makes all of ``calls``; None where replay.cpp does not know the types of one."""
    invokers = {function: library.signature(function.letters) for function in {call.function for call in calls}}
    return NativeCalls(calls, invokers) if all(invokers.values()) else None


def record(work: Callable[[], tuple[Tensor, ...]], scratch: Scratch) -> Recording:
    """Walk through ``work`` and hold on to what it wants done; nothing of that is done yet.

    It must read nothing but memory that stays where it is, and must do the same whatever values it finds there, even
    meaningless ones. Results of native kernels must come from ``memory.empty``.

    Raises:
        NotRepeatableError: it does not.
    """
    return Recording(*walk(work, scratch), scratch)


def walk(work: Callable[[], Outputs], scratch: Scratch) -> tuple[list[NativeCall | Callable[[], object]], Outputs]:
    """What ``work`` wants done, and its results, that are still empty; the rest as of ``record``."""
    recorder = _Recorder(scratch)
    with results_in(scratch), recorder, library.noting(recorder.note):
        outputs = work()
    return recorder.calls, outputs


class _Recorder(TorchDispatchMode):
    """Sees every operation of torch, and is told of every native call."""

    def __init__(self, scratch: Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch = scratch
        self.calls: list[NativeCall | Callable[[], object]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See TorchDispatchMode: nothing is compiled here, and wrapping for it would import the whole compiler."""
        return False

    def note(self, function: library.NativeFunction, arguments: tuple[float | None, ...]) -> None:
        """``function`` is to be called."""
        self.calls.append(NativeCall(function, arguments))

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note ``func`` if it is more than another view of what there is."""
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if not _UNREPEATABLE.isdisjoint(func.tags):
            raise NotRepeatableError(f"{func} cannot be repeated")
        result = args[0] if func._schema.is_mutable else func(*args, **kwargs)  # for its shape, if it is a new tensor
        known = {_address(tensor) for tensor in _tensors([*args, *kwargs.values()])}
        is_new = any(_address(tensor) not in known for tensor in _tensors([result]))
        if not (is_new or func._schema.is_mutable):
            return result
        if not isinstance(result, Tensor) or (func._schema.is_mutable and not _changes_first(func)):
            raise NotRepeatableError(f"{func} cannot be repeated")
        unclaimed = {name: self._without_claims(value) for name, value in kwargs.items()}
        again = partial(func, *map(self._without_claims, args), **unclaimed)
        self.calls.append(partial(_refill, result, again) if is_new else again)
        return result

    def _without_claims(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._scratch.without_claim(value)
        return [self._without_claims(one) for one in value] if isinstance(value, list | tuple) else value


def _changes_first(func: Any) -> bool:
    """Whether ``func``, which changes an argument, changes the first one and returns it."""
    changed = [argument for argument in func._schema.arguments if argument.is_write]
    return changed == [func._schema.arguments[0]] and len(func._schema.returns) == 1


def _joined(calls: Sequence[NativeCall]) -> list[Callable[[], object]]:
    joined = join(calls)
    return [call.function.bind(*call.arguments) for call in calls] if joined is None else [joined]


def _refill(output: Tensor, work: Callable[[], Tensor]) -> None:
    output.copy_(work())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
