"""What somebody sees who starts a cluster for the first time: it is up, it is down, or one line says why not."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Self

from baton import Client, LocalCluster
from tests.e2e.harness import descendants, eventually, processes_with

BATON = str(Path(sys.executable).with_name("baton"))
STOP_SECONDS = 5.0
START_SECONDS = 90.0
PROGRESS = re.compile(r"(starting|loading|waiting) .* \(\d+ s\)")


class Launched:
    """``baton cluster`` in a process group of its own, as a terminal runs it; every process of it bears a mark."""

    def __init__(self, *arguments: str, command: tuple[str, ...] = (BATON, "cluster")) -> None:
        self.mark = f"BATON_E2E_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, name: value},
        )

    def ready(self) -> str:
        """The ready line; the address is in it."""
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: grpc 127.0.0.1:"), self.process.stderr.read()
        return line

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, seconds: float) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, and stderr without lines of progress."""
        out, err = self.process.communicate(timeout=seconds)
        lines = [line for line in err.splitlines(keepends=True) if not PROGRESS.fullmatch(line.strip())]
        return self.process.returncode, out, "".join(lines)

    def left(self) -> dict[int, str]:
        return processes_with(self.mark)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        left = self.left()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()
        assert not left, f"still there: {left}"


def one_error_line(launched: Launched) -> str:
    """The only line of a launcher that failed."""
    code, out, err = launched.finish(START_SECONDS)
    assert (code, out) == (1, "")
    assert not launched.left()
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def address(ready_line: str) -> str:
    return ready_line.removeprefix("ready: grpc ").partition(",")[0]


def test_first_minutes() -> None:
    """With the checkpoint that comes with Baton: start, read the ready line, do what it says, look, leave."""
    with Launched("--port", "0", "--executors", "2") as launched:
        line = launched.ready()
        assert "tiny_python" in line and "2 executors" in line
        hint = line.partition("try: baton ")[2].replace("'", "").split(maxsplit=3)
        tried = subprocess.run([BATON, *hint], capture_output=True, text=True, timeout=60, check=False)
        assert (tried.returncode, tried.stderr) == (0, "")
        assert tried.stdout
        status = subprocess.run(
            [BATON, "status", "--server", address(line)], capture_output=True, text=True, timeout=60, check=False
        )
        assert "executor-0" in status.stdout and "executor-1" in status.stdout
        pressed = time.monotonic()
        launched.press_ctrl_c()
        code, _, err = launched.finish(STOP_SECONDS)
        assert (code, err) == (130, "")
        assert time.monotonic() - pressed < STOP_SECONDS
        assert not launched.left()


def test_ctrl_c_while_it_serves(checkpoint_f32: Path) -> None:
    with (
        Launched("--model", str(checkpoint_f32), "--port", "0") as launched,
        Client(address(launched.ready())) as client,
    ):
        stream = client.stream("x", max_tokens=2000, ignore_eos=True)
        next(stream)
        launched.press_ctrl_c()
        assert launched.finish(STOP_SECONDS)[0] == 130
        assert not launched.left()


def test_ctrl_c_with_frozen_children(checkpoint_f32: Path) -> None:
    with Launched("--model", str(checkpoint_f32), "--port", "0") as launched:
        launched.ready()
        for pid in descendants(launched.process.pid)[1:]:
            os.kill(pid, signal.SIGSTOP)
        launched.press_ctrl_c()
        assert launched.finish(STOP_SECONDS)[0] == 130
        assert not launched.left()


def test_a_second_ctrl_c_kills_at_once(checkpoint_f32: Path) -> None:
    with Launched("--model", str(checkpoint_f32), "--port", "0") as launched:
        launched.ready()
        for pid in descendants(launched.process.pid)[1:]:
            os.kill(pid, signal.SIGSTOP)
        launched.press_ctrl_c()
        time.sleep(0.3)
        launched.press_ctrl_c()
        assert launched.finish(1.5)[0] == 130
        assert not launched.left()


def test_ctrl_c_while_it_starts(checkpoint_f32: Path) -> None:
    with Launched("--model", str(checkpoint_f32), "--port", "0") as launched:
        assert eventually(lambda: any("executor_service" in line for line in launched.left().values()), START_SECONDS)
        launched.press_ctrl_c()
        assert launched.finish(STOP_SECONDS) == (130, "", "")
        assert not launched.left()


def test_sigterm(checkpoint_f32: Path) -> None:
    with Launched("--model", str(checkpoint_f32), "--port", "0") as launched:
        launched.ready()
        launched.process.terminate()
        assert launched.finish(STOP_SECONDS)[0] == 143
        assert not launched.left()


def test_a_killed_launcher_takes_everything_with_it(checkpoint_f32: Path) -> None:
    with Launched("--model", str(checkpoint_f32), "--port", "0") as launched:
        launched.ready()
        launched.process.kill()
        assert eventually(lambda: not launched.left(), STOP_SECONDS), launched.left()


def test_a_dead_scheduler_ends_it_with_one_line(checkpoint_f32: Path) -> None:
    with Launched("--model", str(checkpoint_f32), "--port", "0") as launched:
        launched.ready()
        (scheduler,) = [pid for pid, line in launched.left().items() if "-m scheduler_service --model" in line]
        os.kill(scheduler, signal.SIGKILL)
        code, _, err = launched.finish(STOP_SECONDS)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 1
        assert errors == ["error: scheduler was killed by SIGKILL; all executors are stopped"]
        assert not launched.left()


def test_a_dead_executor_is_restarted_with_one_line(checkpoint_f32: Path) -> None:
    with (
        Launched("--model", str(checkpoint_f32), "--port", "0") as launched,
        Client(address(launched.ready())) as client,
    ):
        (executor,) = [pid for pid, line in launched.left().items() if "-m executor_service" in line]
        os.kill(executor, signal.SIGKILL)
        assert client.generate("x", max_tokens=3, ignore_eos=True, timeout=60).usage.completion_tokens == 3
        launched.press_ctrl_c()
        code, _, err = launched.finish(STOP_SECONDS)
        assert code == 130
        assert "executor-0 was killed by SIGKILL; it is restarted in 0.2 s\n" in err


def test_port_in_use(cluster: LocalCluster) -> None:
    port = cluster.address.rpartition(":")[2]
    with Launched("--port", port) as launched:
        line = one_error_line(launched)
        assert port in line and "in use" in line


def test_missing_checkpoint(tmp_path: Path) -> None:
    with Launched("--model", str(tmp_path / "nothing"), "--port", "0") as launched:
        assert str(tmp_path / "nothing") in one_error_line(launched)


def test_unsupported_checkpoint(tmp_path: Path, checkpoint_f32: Path) -> None:
    copy = shutil.copytree(checkpoint_f32, tmp_path / "exotic")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(
        config.replace("Qwen3ForCausalLM", "MammothForCausalLM").replace("qwen3", "mammoth")
    )
    with Launched("--model", str(copy), "--port", "0") as launched:
        assert "MammothForCausalLM" in one_error_line(launched)


def test_damaged_checkpoint(tmp_path: Path, checkpoint_f32: Path) -> None:
    copy = shutil.copytree(checkpoint_f32, tmp_path / "damaged")
    os.truncate(copy / "model.safetensors", 1000)
    with Launched("--model", str(copy), "--port", "0") as launched:
        assert "safetensors" in one_error_line(launched)


def test_an_executor_that_dies_at_start(checkpoint_f32: Path) -> None:
    with Launched("--model", str(checkpoint_f32), "--port", "0", "--dtype", "float7") as launched:
        assert "--dtype" in one_error_line(launched)


def test_log_directory(tmp_path: Path, checkpoint_f32: Path) -> None:
    arguments = ("--model", str(checkpoint_f32), "--port", "0", "--log-level", "info", "--log-dir", str(tmp_path / "l"))
    with Launched(*arguments) as launched:
        launched.ready()
        launched.press_ctrl_c()
        assert launched.finish(STOP_SECONDS)[2] == ""
    assert {path.name for path in (tmp_path / "l").iterdir()} == {"scheduler.log", "executor-0.log"}


def test_make_run_cluster(checkpoint_f32: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = Path(sys.executable).parent.parent
    make = ("make", "-C", str(root), "-o", f"{environment}/.installed", "run-cluster", f"VENV={environment}")
    with Launched(f"MODEL={checkpoint_f32}", "PORT=0", "EXECUTORS=1", command=make) as launched:
        assert launched.process.stdout is not None
        line = launched.process.stdout.readline()
        if line.startswith("make"):  # make -C says where it goes
            line = launched.process.stdout.readline()
        assert line.startswith("ready: grpc 127.0.0.1:")
        launched.press_ctrl_c()
        assert launched.finish(STOP_SECONDS)[2] == ""  # make is quiet, too
        assert not launched.left()
