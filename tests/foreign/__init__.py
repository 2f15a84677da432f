"""Functions of a script that runs in another environment, with packages that do not go with Baton's."""

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_RUNNER = Path(__file__).with_name("runner.py")


class ForeignError(Exception):
    """A function raised; the message is its traceback."""


class ForeignScript:
    """One process that has loaded a script and calls its functions, one after another."""

    def __init__(self, venv: Path, script: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [venv / "bin" / "python", _RUNNER, script, *arguments],
            env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, function: str, **arguments: Any) -> Any:
        """What the function returned, by way of JSON.

        Raises:
            ForeignError: it raised.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the script has ended; its last words are above"
        answer = json.loads(line)
        if "error" in answer:
            raise ForeignError(answer["error"])
        return answer["result"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=30)
