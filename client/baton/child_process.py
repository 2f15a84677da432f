"""One child process of a local cluster: its own session, its output read line by line, its end explained."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO

_ERROR_PREFIX = "error: "
_PUMP_SECONDS = 1.0


class ChildProcess:
    """A running child.

    It gets a session of its own, so that a terminal's Ctrl-C reaches the launcher only, which then stops its children
    in order. The kernel may be told to end children with the *thread* that made them (prctl PDEATHSIG): construct it
    in a thread that outlives it.

    Args:
        name: what messages call it.
        command: program and arguments.
        env: its whole environment.
        on_stdout: called with each line it prints, from a thread of its own.
        on_stderr: likewise for its log; lines that begin with ``error: `` are kept as its last words instead.
        on_exit: called once it has exited, from a thread of its own.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        on_stdout: Callable[[str], None],
        on_stderr: Callable[[str], None],
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._on_stderr = on_stderr
        self._error = ""
        self._last_line = ""
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._pumps = (
            threading.Thread(target=_pump, args=(self._process.stdout, on_stdout), name=f"{name} stdout", daemon=True),
            threading.Thread(target=_pump, args=(self._process.stderr, self._log), name=f"{name} stderr", daemon=True),
        )
        for pump in self._pumps:
            pump.start()
        threading.Thread(target=_await_exit, args=(self.pid, on_exit), name=f"{name} exit", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exited(self) -> bool:
        return self._process.poll() is not None

    def terminate(self) -> None:
        """Asks it to stop; a process with children of its own stops those itself."""
        if not self.exited():
            self._process.terminate()

    def kill(self) -> None:
        """Ends it and whatever is left of its process group, at once, and reaps it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._join_pumps()

    def last_words(self) -> str:
        """Why it exited, in its own words if it left any, else what is known; it must have exited."""
        self._join_pumps()  # the words may still be in the pipe
        return self._error or self._ending(self._last_line)

    def how_it_ended(self) -> str:
        """Name, exit code or signal, and its last words; it must have exited."""
        self._join_pumps()
        return self._ending(self._error)

    def _ending(self, words: str) -> str:
        code = self._process.returncode
        ending = f"{self.name} exited with code {code}"
        if code < 0:
            ending = f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{ending}: {words}" if words else ending

    def _join_pumps(self) -> None:
        for pump in self._pumps:
            pump.join(_PUMP_SECONDS)

    def _log(self, line: str) -> None:
        if line.startswith(_ERROR_PREFIX):
            self._error = line.removeprefix(_ERROR_PREFIX)
            return
        if line.strip():
            self._last_line = line.strip()
        self._on_stderr(line)


def _await_exit(pid: int, on_exit: Callable[[], None]) -> None:
    with contextlib.suppress(ChildProcessError):  # it has exited and been reaped
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    on_exit()


def _pump(pipe: IO[bytes], on_line: Callable[[str], None]) -> None:
    with pipe:
        for line in pipe:
            on_line(line.decode(errors="replace").rstrip("\r\n"))
