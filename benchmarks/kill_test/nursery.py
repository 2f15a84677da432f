"""Starts executors by forking: what an executor imports is loaded once, a new one is there within a tenth of a second.

``python -m benchmarks.kill_test.nursery`` reads JSON lines ``{"arguments": [...]}`` and answers ``{"pid": ...}``. Each
child is a process of its own from there on: ``python -m executor_service`` with these arguments.
"""

import json
import os
import signal
import sys

import executor_service.startup  # noqa: F401 - loads torch, once
from executor_service.__main__ import main as run_executor
from scheduler_service.process import die_with_parent


def main() -> None:
    """Serve until stdin ends."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: they are watched through the scheduler
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)["arguments"]
        pid = os.fork()
        if pid == 0:
            _become_executor(arguments)
        print(json.dumps({"pid": pid}), flush=True)


def _become_executor(arguments: list[str]) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    sys.argv = ["executor_service", *arguments]
    try:
        code = run_executor()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    os._exit(code)


if __name__ == "__main__":
    main()
