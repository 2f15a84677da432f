"""Recordings of work of many sizes: a step's number of tokens changes all the time, what is done with them does not.

Results of any size lie where those of the largest one do, so that addresses are always the same. All else that calls
are given is a number that does not depend on the sizes or is affine in them: found from a few sizes, tried on one more.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, cast

import numpy as np
from numpy.typing import NDArray

from kernels.native.memory import Scratch
from kernels.native.recording import NativeCall, NativeCalls, NotRepeatableError, Outputs, join, walk


class SizedRecording(Generic[Outputs]):
    """Calls whose arguments depend on sizes, the tensors that they fill, and the scratch in which these lie."""

    def __init__(self, calls: NativeCalls, factors: NDArray[np.int64], outputs: Outputs, scratch: Scratch) -> None:
        """``factors``: of a constant and of each size in each word of ``calls`` [1 + sizes, words]. ``outputs``: of the
        largest size; they have as many rows as the first size says.
        """
        self._scratch = scratch
        self._calls = calls
        self._varying = np.flatnonzero(factors[1:].any(0))
        self._factors = np.ascontiguousarray(factors[:, self._varying])
        self._outputs = outputs

    def run(self, *sizes: int) -> Outputs:
        """Make the calls; results last until anybody uses the scratch."""
        self._calls.words[self._varying] = np.array([1, *sizes]) @ self._factors
        self._calls()
        return self.results(sizes[0])

    def results(self, rows: int) -> Outputs:
        """What the next run with so many rows fills."""
        return cast(Outputs, tuple(None if output is None else output[:rows] for output in self._outputs))


def record_sized(work: Callable[..., Outputs], most: Sequence[int], scratch: Scratch) -> SizedRecording[Outputs]:
    """Walk through ``work(*sizes)`` for some sizes up to ``most``; it is as of ``record``, and does nothing but call
    native functions. The recording may be run whenever the scratch is idle.

    Args:
        most: greatest sizes, positive; the first one is the number of rows of results.

    Raises:
        NotRepeatableError: it does more, or something else at another size.
    """
    halves = [max(1, size // 2) for size in most]
    probes = [[1] * len(most), *([*most[:i], half, *most[i + 1 :]] for i, half in enumerate(halves))]
    trial, *fewer = (_walk(work, sizes, most, scratch)[0] for sizes in probes)
    calls, outputs = _walk(work, most, most, scratch)
    if any(one.functions != calls.functions for one in (trial, *fewer)):
        raise NotRepeatableError("other calls are made at other sizes")
    slopes = [
        (calls.words - one.words) // max(1, size - half) for one, size, half in zip(fewer, most, halves, strict=True)
    ]
    constants = calls.words - sum(size * slope for size, slope in zip(most, slopes, strict=True))
    factors = np.stack([constants, *slopes])
    for sizes, one in zip(probes, (trial, *fewer), strict=True):
        if not np.array_equal(np.array([1, *sizes]) @ factors, one.words):
            raise NotRepeatableError("what calls are given is not affine in the sizes")
    unclaimed = tuple(None if output is None else scratch.without_claim(output) for output in outputs)
    return SizedRecording(calls, factors, cast(Outputs, unclaimed), scratch)


def _walk(
    work: Callable[..., Outputs], sizes: Sequence[int], most: Sequence[int], scratch: Scratch
) -> tuple[NativeCalls, Outputs]:
    with scratch.with_room(sizes[0], most[0]):
        calls, outputs = walk(partial(work, *sizes), scratch)
    natives = [call for call in calls if isinstance(call, NativeCall)]
    joined = join(natives) if len(natives) == len(calls) else None
    if joined is None:
        raise NotRepeatableError("work of many sizes can only call native functions")
    return joined, outputs
