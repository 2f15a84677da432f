"""Schedulers and executors as processes that may be killed and started again."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.kill_test.proxy import Proxy
from benchmarks.kill_test.scheduler_log import SchedulerLog
from benchmarks.ports import free_port
from benchmarks.processes import Child, python_module

_START_SECONDS = 60.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run.

    Attributes:
        num_blocks, max_rows, threads: of each executor.
        proxies: whether there are any between executors and schedulers.
        delay: seconds that these add in each direction.
        loss: share of the messages that they lose.
        logs: directory for a log of JSON lines per scheduler, and the executors'; None = they go to stderr.
        scheduler_arguments, executor_arguments: further flags.
    """

    model: Path
    schedulers: int = 1
    executors: int
    api_processes: int = 1
    num_blocks: int
    max_rows: int
    threads: int = 1
    log_level: str = "error"
    proxies: bool = False
    delay: float = 0.0
    loss: float = 0.0
    logs: Path | None = None
    scheduler_arguments: Sequence[str] = ()
    executor_arguments: Sequence[str] = ()


class SchedulerPlace:
    """A scheduler and its ports; processes come and go."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.grpc, self.executors = free_port(), free_port()
        self.child: Child | None = None
        self.log = None if settings.logs is None else SchedulerLog(settings.logs / f"scheduler-{self.grpc}.jsonl")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc}"

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.executors}"

    def start(self) -> None:
        """Start it and return at once."""
        settings = self._settings
        arguments = [
            *("--model", settings.model, "--port", self.grpc, "--executor-endpoint", self.endpoint),
            *("--api-processes", settings.api_processes, "--log-level", settings.log_level),
            *("--check-integrity", "--shutdown-grace", "1", "--log-format", "text" if self.log is None else "json"),
            *settings.scheduler_arguments,
        ]
        path = None if self.log is None else self.log.path
        self.child = Child("scheduler", python_module("scheduler_service", *arguments), log=path)

    def await_start(self) -> None:
        """Return once it listens."""
        assert self.child is not None
        self.child.line(_START_SECONDS)

    def kill(self) -> None:
        """SIGKILL to all its processes at once."""
        assert self.child is not None
        self.child.kill()


@dataclass(slots=True)
class ExecutorPlace:
    """An executor's name, its way to the schedulers, and its present process."""

    executor_id: str
    proxies: list[Proxy]
    pid: int = 0

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def is_gone(self) -> bool:
        """Whether its process has ended."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False


class KillableCluster:
    """Everything on this machine, ready for harm; a context manager. Use it on one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.schedulers = [SchedulerPlace(settings) for _ in range(settings.schedulers)]
        self.executors = [ExecutorPlace(f"executor-{index}", []) for index in range(settings.executors)]
        log = None if settings.logs is None else settings.logs / "executors.log"
        command = python_module("benchmarks.kill_test.nursery")
        self._nursery = Child("nursery", command, _ENVIRONMENT, stdin=True, log=log)

    @property
    def addresses(self) -> list[str]:
        """Where clients find the schedulers."""
        return [scheduler.address for scheduler in self.schedulers]

    async def start(self) -> None:
        """Start all processes; executors may still be joining when it returns."""
        for scheduler in self.schedulers:
            scheduler.start()
        for scheduler in self.schedulers:
            scheduler.await_start()
        self._nursery.json(_START_SECONDS)
        for place in self.executors:
            if self._settings.proxies:
                ports = [scheduler.executors for scheduler in self.schedulers]
                delay, loss = self._settings.delay, self._settings.loss
                place.proxies = [await Proxy.open("127.0.0.1", port, delay, loss) for port in ports]
            self.start_executor(place)

    def start_executor(self, place: ExecutorPlace) -> None:
        """Start a process in a place whose last one has ended."""
        settings = self._settings
        endpoints = [one.endpoint for one in place.proxies or self.schedulers]
        arguments = [
            *("--scheduler", ",".join(endpoints), "--model", str(settings.model)),
            *("--executor-id", place.executor_id, "--num-blocks", str(settings.num_blocks)),
            *("--threads", str(settings.threads), "--max-rows", str(settings.max_rows), "--device", "cpu"),
            *("--log-level", settings.log_level, "--die-with-parent"),
            *settings.executor_arguments,
        ]
        self._nursery.say(json.dumps({"arguments": arguments}))
        place.pid = int(self._nursery.json(_START_SECONDS)["pid"])

    async def stop_proxies(self) -> None:
        """Close the ways between executors and schedulers: the last thing to do on the event loop."""
        for place in self.executors:
            for proxy in place.proxies:
                await proxy.close()

    def close(self) -> None:
        """End all processes."""
        for place in self.executors:
            if place.pid and not place.is_gone():
                place.signal(signal.SIGKILL)
        self._nursery.kill()
        for scheduler in self.schedulers:
            if scheduler.child is not None:
                scheduler.child.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
