"""Child processes of benchmarks."""

import sys

from benchmarks.processes import Child

ECHO = "import sys; print(sys.stdin.readline(), end='', flush=True); sys.stdin.readline()"


def test_killed_children_leave_no_pipe_open() -> None:
    with Child("echo", [sys.executable, "-c", ECHO], stdin=True) as child:
        child.say("hello")
        assert child.line(60) == "hello"
    stdin, stdout = child.process.stdin, child.process.stdout
    assert stdin is not None and stdout is not None
    assert (stdin.closed, stdout.closed) == (True, True)
