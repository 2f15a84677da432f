"""Running requests against a local cluster, and looking at its processes."""

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from baton import AsyncClient, Client, ClusterOptions, ClusterStatus, Completion
from tests.e2e.corpus import MAX_TOKENS, CorpusRequest

# One thread: the machine has few cores, and a cluster has several processes.
DEFAULTS: dict[str, Any] = {"port": 0, "threads": 1, "num_blocks": 2000}


def options(model: Path, **changes: Any) -> ClusterOptions:
    return ClusterOptions(model=model, **{**DEFAULTS, **changes})


def run_together(
    address: str, requests: Sequence[CorpusRequest], clients: int = 1, **sampling: Any
) -> list[Completion]:
    """Streams all requests at the same time, over as many connections as there are clients."""

    async def run() -> list[Completion]:
        async with AsyncExitStack() as stack:
            connected = [await stack.enter_async_context(AsyncClient(address)) for _ in range(clients)]
            streams = [
                client.stream(one.prompt, max_tokens=MAX_TOKENS, ignore_eos=True, seed=one.seed, **sampling).result()
                for client, one in zip(itertools.cycle(connected), requests, strict=False)
            ]
            return list(await asyncio.gather(*streams))

    return asyncio.run(run())


def run_alone(client: Client, request: CorpusRequest, **sampling: Any) -> Completion:
    return client.generate(request.prompt, max_tokens=MAX_TOKENS, ignore_eos=True, seed=request.seed, **sampling)


def eventually(check: Callable[[], bool], seconds: float) -> bool:
    """Whether ``check`` becomes true within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_idle(status: ClusterStatus) -> bool:
    """Nothing runs, waits or holds a block."""
    return not status.queued_requests and not any(
        one.running_requests or one.waiting_requests or one.used_blocks or one.inflight_steps
        for one in status.executors
    )


def processes_with(marker: str) -> dict[int, str]:
    """Pid and command line of every process, not yet a zombie, that has ``marker`` in its environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if marker.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has just ended, or belongs to somebody else
    return found


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state parent ...; the name may hold anything.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    family = [pid]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return family


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first index at which the sequences differ, or the shorter one's length."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
