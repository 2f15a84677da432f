"""What lasts as long as one wants: executors that are frozen, cut off, or hang, and are well again afterwards."""

import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from benchmarks.kill_test.cluster import ExecutorPlace
from benchmarks.kill_test.hang import hung
from kernels.native.build import build, choose_isa


@asynccontextmanager
async def _frozen(place: ExecutorPlace) -> AsyncIterator[None]:
    """SIGSTOP."""
    place.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        place.signal(signal.SIGCONT)


@asynccontextmanager
async def _silenced(place: ExecutorPlace) -> AsyncIterator[None]:
    """Nothing gets through, and no connection breaks."""
    for proxy in place.proxies:
        proxy.silence()
    try:
        yield
    finally:
        for proxy in place.proxies:
            proxy.heal()


def _stuck(place: ExecutorPlace) -> AbstractAsyncContextManager[None]:
    """Its step does not end, its heartbeats go on."""
    return hung(place.pid, build(choose_isa()))


LASTING: Mapping[str, Callable[[ExecutorPlace], AbstractAsyncContextManager[None]]] = {
    "stop": _frozen,
    "silence": _silenced,
    "hang": _stuck,
}
"""By name."""
