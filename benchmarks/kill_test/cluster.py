"""Schedulers and executors as processes that may be killed and started again."""

import json
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.kill_test.proxy import Proxy
from benchmarks.processes import Child, python_module

_START_SECONDS = 60.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run."""

    model: Path
    schedulers: int
    executors: int
    api_processes: int
    num_blocks: int
    max_rows: int
    log_level: str
    proxies: bool  # between executors and schedulers
    delay: float  # seconds that these add in each direction


class SchedulerPlace:
    """A scheduler and its ports; processes come and go."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.grpc, self.executors = _free_port(), _free_port()
        self.child: Child | None = None

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
            *("--check-integrity", "--shutdown-grace", "1"),
        ]
        self.child = Child("scheduler", python_module("scheduler_service", *arguments))

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
        self._nursery = Child("nursery", python_module("benchmarks.kill_test.nursery"), _ENVIRONMENT, stdin=True)

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
                place.proxies = [await Proxy.open("127.0.0.1", port, self._settings.delay) for port in ports]
            self.start_executor(place)

    def start_executor(self, place: ExecutorPlace) -> None:
        """Start a process in a place whose last one has ended."""
        settings = self._settings
        endpoints = [one.endpoint for one in place.proxies or self.schedulers]
        arguments = [
            *("--scheduler", ",".join(endpoints), "--model", str(settings.model)),
            *("--executor-id", place.executor_id, "--num-blocks", str(settings.num_blocks), "--threads", "1"),
            *("--max-rows", str(settings.max_rows), "--log-level", settings.log_level, "--device", "cpu"),
            "--die-with-parent",
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


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
