"""A whole cluster on this machine: one scheduler, some executors, watched and restarted."""

import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from baton.bell import Bell
from baton.child_process import ChildProcess
from baton.client import Client
from baton.cluster_options import ClusterOptions
from baton.cluster_report import ProcessLogs, Reporter, StderrReporter
from baton.errors import BatonError, ClusterError

_POLL_SECONDS = 0.05
# A signal that comes just before the main thread falls asleep is handled when it wakes: it must not sleep for ever.
_SIGNAL_SECONDS = 0.1
_SCHEDULER_GRACE_SECONDS = 3.0
_EXECUTOR_GRACE_SECONDS = 1.2  # they go after the scheduler and own nothing; everything is gone within 5 s
_FIRST_BACKOFF_SECONDS = 0.2
_MAX_BACKOFF_SECONDS = 10.0
_HEALTHY_SECONDS = 60.0
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1"}
_LISTENING = re.compile(r"listening: grpc (?P<grpc>\S+) executors (?P<executors>\S+)")


class _StopRequestedError(Exception):
    """Somebody asked to stop during the start."""


@dataclass(frozen=True, slots=True)
class _Endpoints:
    """Where the scheduler listens."""

    grpc: str
    executors: str


@dataclass(slots=True)
class _Place:
    """A place for an executor; processes come and go in it. Times are of the monotonic clock, in seconds."""

    executor_id: str
    process: ChildProcess | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    backoff: float = _FIRST_BACKOFF_SECONDS


class LocalCluster:
    """Starts a cluster, keeps it up, stops it; a context manager.

    One thread makes all processes, restarts executors that die, and ends everything when asked to or when the
    scheduler dies. No process outlives it, not even when this process is killed.

    Args:
        options: what to run.
        reporter: gets news and log lines; default: they go to stderr.

    Raises:
        ClusterError: in ``start`` and ``with``: a process died, the message is its own.
    """

    def __init__(self, options: ClusterOptions, reporter: Reporter | None = None) -> None:
        self._options = options
        self._reporter = reporter or StderrReporter()
        self._logs = ProcessLogs(options.log_dir, self._reporter)
        self._endpoints: _Endpoints | None = None
        self._scheduler: ChildProcess | None = None
        self._places = [_Place(f"executor-{index}") for index in range(options.executors)]
        self._thread = threading.Thread(target=self._run, name="local cluster", daemon=True)
        self._settled = threading.Event()  # the start has succeeded, failed, or was stopped
        self._failure: ClusterError | None = None
        # Plain flags: signal handlers set them, where taking a lock could deadlock.
        self._stopping = False
        self._killing = False
        self._news = Bell()  # a process has exited, or somebody wants to stop

    @property
    def address(self) -> str:
        """``host:port`` for clients; empty before the start."""
        return self._endpoints.grpc if self._endpoints else ""

    @property
    def scheduler_pid(self) -> int:
        """The scheduler's first process; 0 before the start."""
        return self._scheduler.pid if self._scheduler else 0

    def executor_pids(self) -> dict[str, int]:
        """Process ids of the executors that run right now, by executor id."""
        return {place.executor_id: place.process.pid for place in self._places if place.process is not None}

    @property
    def failure(self) -> ClusterError | None:
        """Why the cluster came down by itself; None as long as it has not."""
        return self._failure

    def start(self) -> None:
        """Returns when the scheduler serves and every executor is ready.

        Raises:
            ClusterError: a process died, or somebody asked to stop meanwhile; everything is stopped.
        """
        self._thread.start()
        try:
            while not self._settled.wait(_SIGNAL_SECONDS):
                pass
        except BaseException:  # Ctrl-C; a `with` that fails to enter does not exit
            self.stop()
            raise
        if self._failure is not None or self._stopping:
            self._join()
            raise self._failure or ClusterError("stopped before it was ready")

    def wait(self) -> None:
        """Returns once the cluster was asked to stop and has.

        Raises:
            ClusterError: the scheduler died; everything is stopped.
        """
        self._join()
        if self._failure is not None:
            raise self._failure

    def request_stop(self) -> None:
        """Begins to stop and returns at once; safe in a signal handler."""
        self._stopping = True
        self._news.ring()

    def request_kill(self) -> None:
        """Like ``request_stop``, without grace."""
        self._killing = True
        self.request_stop()

    def stop(self) -> None:
        """Stops every process, within 5 seconds; may be called more than once."""
        self.request_stop()
        self._join()

    def _join(self) -> None:
        if threading.current_thread() is self._thread:
            return  # a garbage collection that happened to run here asked to stop
        while self._thread.is_alive():
            self._thread.join(_SIGNAL_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Everything below runs in the cluster's thread. That thread makes the processes because the kernel ends them with
    # the thread that made them.

    def _run(self) -> None:
        try:
            self._bring_up()
            self._settled.set()
            while not self._stopping:
                self._watch()
                self._news.wait(self._until_restart())
        except _StopRequestedError:
            pass
        except ClusterError as error:
            self._failure = error
        except OSError as error:  # no log directory, no memory for a process
            self._failure = ClusterError(str(error))
        finally:
            self._shut_down()
            self._settled.set()

    def _bring_up(self) -> None:
        for package in ("scheduler_service", "executor_service"):
            if importlib.util.find_spec(package) is None:
                raise ClusterError(f"{package} is not installed here; a local cluster needs a checkout of Baton")
        self._logs.open()
        self._scheduler = self._spawn("scheduler", self._options.scheduler_command(), self._read_scheduler)
        while self._endpoints is None:
            self._go_on_waiting("starting the scheduler")
        for place in self._places:
            self._start_executor(place)
        with Client(self._endpoints.grpc, credentials=self._options.credentials) as client:
            while (ready := _ready_executors(client)) < len(self._places):
                self._go_on_waiting(f"loading the model: {ready} of {len(self._places)} executors ready")
            while not _serves(client):
                self._go_on_waiting("waiting for the scheduler to serve")

    def _go_on_waiting(self, what_for: str) -> None:
        if self._stopping:
            raise _StopRequestedError
        for process in (self._scheduler, *(place.process for place in self._places)):
            if process is not None and process.exited():
                raise ClusterError(process.last_words())
        self._reporter.progress(what_for)
        time.sleep(_POLL_SECONDS)

    def _watch(self) -> None:
        assert self._scheduler is not None
        if self._scheduler.exited():
            raise ClusterError(f"{self._scheduler.how_it_ended()}; all executors are stopped")
        now = time.monotonic()
        for place in self._places:
            if place.process is None:
                if now >= place.restart_at:
                    self._start_executor(place)
            elif place.process.exited():
                self._bury(place, place.process, now)

    def _until_restart(self) -> float | None:
        """Seconds; None if no executor is to be restarted."""
        times = [place.restart_at for place in self._places if place.process is None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _bury(self, place: _Place, process: ChildProcess, now: float) -> None:
        if now - place.started_at >= _HEALTHY_SECONDS:
            place.backoff = _FIRST_BACKOFF_SECONDS
        self._reporter.event(f"{process.how_it_ended()}; it is restarted in {place.backoff:g} s")
        process.kill()
        place.process = None
        place.restart_at = now + place.backoff
        place.backoff = min(2 * place.backoff, _MAX_BACKOFF_SECONDS)

    def _start_executor(self, place: _Place) -> None:
        assert self._endpoints is not None
        name = place.executor_id
        command = self._options.executor_command(name, self._endpoints.executors)
        place.process = self._spawn(name, command, lambda line: self._log(name, line))
        place.started_at = time.monotonic()

    def _spawn(self, name: str, command: Sequence[str], on_stdout: Callable[[str], None]) -> ChildProcess:
        return ChildProcess(
            name,
            # -P: folders of the user's working directory must not shadow our packages.
            [sys.executable, "-P", "-m", *command],
            {**_ENVIRONMENT, **os.environ, "BATON_DIE_WITH_PARENT": "1"},
            on_stdout,
            lambda line: self._log(name, line),
            self._news.ring,
        )

    def _read_scheduler(self, line: str) -> None:
        if self._endpoints is None and (match := _LISTENING.fullmatch(line)):
            self._endpoints = _Endpoints(**match.groupdict())
        else:
            self._log("scheduler", line)

    def _log(self, name: str, line: str) -> None:
        # On the way down executors complain that their scheduler left; that interests nobody but a log file.
        if not self._stopping or self._options.log_dir is not None:
            self._logs.write(name, line)

    def _shut_down(self) -> None:
        if self._scheduler is not None:
            self._end([self._scheduler], _SCHEDULER_GRACE_SECONDS)
        self._end([place.process for place in self._places if place.process is not None], _EXECUTOR_GRACE_SECONDS)
        self._logs.close()

    def _end(self, processes: Sequence[ChildProcess], grace: float) -> None:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + grace
        while not self._killing and time.monotonic() < deadline and not all(one.exited() for one in processes):
            time.sleep(_POLL_SECONDS)
        for process in processes:
            process.kill()


def _ready_executors(client: Client) -> int:
    try:
        return len(client.cluster_status(timeout=1.0).executors)
    except BatonError:
        return 0


def _serves(client: Client) -> bool:
    try:
        client.wait_ready(timeout=0.0)
    except BatonError:
        return False
    return True
