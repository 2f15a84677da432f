"""Starts the scheduler's processes, restarts api processes that die, and stops everything in order."""

import logging
import selectors
import socket
import subprocess
import sys
import time
from typing import IO

from scheduler_service.config import ProcessSpec
from scheduler_service.signals import Signals

logger = logging.getLogger(__name__)

_START_TIMEOUT = 60.0  # seconds
_KILL_AFTER = 1.5  # seconds beyond the grace that running requests get
_POLL = 0.1
_FIRST_BACKOFF = 0.2
_MAX_BACKOFF = 10.0
_HEALTHY_AFTER = 60.0


class StartError(Exception):
    """A process could not be started. Empty when it has said itself why."""


class ApiProcess:
    """One api process and its restarts."""

    def __init__(self, spec: ProcessSpec) -> None:
        self._spec = spec
        self._backoff = _FIRST_BACKOFF
        self._restart_at = 0.0
        self._started_at = 0.0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._started_at = time.monotonic()
        return _spawn("scheduler_service.api", self._spec, stdout=subprocess.DEVNULL)

    def revive(self) -> float | None:
        """Restart the process if it has died, with backoff; seconds until there is more to do, None while it lives."""
        code, now = self.process.poll(), time.monotonic()
        if code is None:
            return None
        if not self._restart_at:
            if now - self._started_at > _HEALTHY_AFTER:
                self._backoff = _FIRST_BACKOFF
            fields = {"index": self._spec.index, "reason": _describe(code), "restart_in_s": self._backoff}
            logger.warning("api process died, it is started again", extra=fields)
            self._restart_at = now + self._backoff
            self._backoff = min(2 * self._backoff, _MAX_BACKOFF)
        elif now >= self._restart_at:
            self._restart_at = 0.0
            self.process = self._start()
            return None
        return max(0.0, self._restart_at - now)


class Launcher:
    """One engine and N api processes. The engine's death ends the scheduler: its streams are lost with it."""

    def __init__(self, spec: ProcessSpec) -> None:
        self._spec = spec
        self._engine: subprocess.Popen[bytes] | None = None
        self._apis: list[ApiProcess] = []
        self._stopping = False

    def stop(self) -> None:
        """End ``start`` or ``supervise`` soon; callable from a signal handler."""
        self._stopping = True

    def start(self) -> str:
        """Start all processes; where executors dial in.

        Raises:
            StartError: one of them ended or did not come up, or ``stop`` was called.
        """
        self._engine = _spawn("scheduler_service.engine", self._spec, stdout=subprocess.PIPE)
        endpoint = self._read_line(self._engine)
        self._apis = [
            ApiProcess(self._spec.model_copy(update={"index": index}))
            for index in range(self._spec.settings.api_processes)
        ]
        self._await_port()
        return endpoint

    def supervise(self) -> int:
        """Wait until a signal's handler calls ``stop`` or the engine dies; the exit code. In the main thread."""
        assert self._engine is not None
        with Signals() as signals:
            while not self._stopping:
                code = self._engine.poll()
                if code is not None:
                    print(f"error: the engine process died ({_describe(code)})", file=sys.stderr)
                    return 1
                pauses = [pause for api in self._apis if (pause := api.revive()) is not None]
                signals.wait(min(pauses, default=None))
        return 0

    def close(self) -> None:
        """Stop the api processes, which let running requests end within their grace, then the engine."""
        deadline = time.monotonic() + self._spec.settings.shutdown_grace + _KILL_AFTER
        _stop([api.process for api in self._apis], deadline)
        if self._engine is not None:
            _stop([self._engine], time.monotonic() + _KILL_AFTER)
            if self._engine.stdout is not None:
                self._engine.stdout.close()

    def _read_line(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        deadline = time.monotonic() + _START_TIMEOUT
        while not _readable(process.stdout, _POLL):
            if self._stopping or time.monotonic() > deadline:
                raise StartError("" if self._stopping else "the engine process did not come up")
        line = process.stdout.readline()
        if not line:
            process.wait()
            raise StartError
        return line.decode().strip()

    def _await_port(self) -> None:
        settings = self._spec.settings
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            for process in [api.process for api in self._apis]:
                if process.poll() is not None:
                    raise StartError
            try:
                socket.create_connection((_connectable(settings.host), settings.port), timeout=1).close()
                return
            except OSError:
                if self._stopping or time.monotonic() > deadline:
                    raise StartError("" if self._stopping else "no api process came up") from None
            time.sleep(_POLL)


def _spawn(module: str, spec: ProcessSpec, stdout: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, spec.model_dump_json()], stdin=subprocess.DEVNULL, stdout=stdout
    )


def _stop(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _readable(stream: IO[bytes], timeout: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def _connectable(host: str) -> str:
    """The address to reach a listener that is bound to ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
