"""Ports beyond this machine need protection, or a word that says they shall have none."""

import subprocess
import sys
from pathlib import Path

import pytest

from executor_service.config import ConfigError as ExecutorConfigError
from executor_service.config import load_settings as load_executor_settings
from scheduler_service.config import ConfigError, load_settings
from scheduler_service.exposure import check_security, warn_if_open

ROOT = Path(__file__).parents[2]


def checked(*flags: str) -> None:
    check_security(load_settings(["--model", "m", *flags]))


def tls(keys: Path) -> list[str]:
    return ["--tls-cert", str(keys / "server.crt"), "--tls-key", str(keys / "server.key")]


def curve(keys: Path) -> list[str]:
    return ["--curve-key", str(keys / "scheduler.key"), "--executor-keys", str(keys / "executors")]


def test_a_local_scheduler_needs_nothing() -> None:
    checked()
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        checked("--host", host)
    for endpoint in ("tcp://localhost:1", "tcp://[::1]:1", "ipc:///run/x"):
        checked("--executor-endpoint", endpoint)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "scheduler", "localhost.example.com", ""])
def test_callers_from_elsewhere_need_tls(host: str, keys: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tls-cert.*baton keys.*--insecure"):
        checked("--host", host, *curve(keys))
    checked("--host", host, *tls(keys))
    checked("--host", host, "--insecure")


@pytest.mark.parametrize("endpoint", ["tcp://*:50052", "tcp://0.0.0.0:1", "tcp://eth0:1", "tcp://[::]:1", "pgm://x:1"])
def test_executors_from_elsewhere_need_keys(endpoint: str, keys: Path) -> None:
    with pytest.raises(ConfigError, match=r"--curve-key.*baton keys.*--insecure"):
        checked("--executor-endpoint", endpoint, *tls(keys))
    checked("--executor-endpoint", endpoint, *curve(keys))
    checked("--executor-endpoint", endpoint, "--insecure")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls-cert", "x"], "together"),
        (["--tls-client-ca", "x"], "needs --tls-cert"),
        (["--curve-key", "x"], "together"),
        (["--executor-keys", "x"], "together"),
        (["--tls-cert", "x", "--tls-key", "y"], "--tls-cert: cannot read x"),
        (["--tokens", "/nowhere"], "--tokens: cannot read /nowhere"),
        (["--tokens", "/dev/null"], "holds no token"),
    ],
)
def test_what_does_not_fit_together_is_said_at_the_start(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        checked(*flags)
    assert "\n" not in str(caught.value)


def test_an_open_door_is_pointed_out(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warned(*flags: str) -> bool:
        caplog.clear()
        warn_if_open(load_settings(["--model", "m", *flags]))
        return "may call" in caplog.text

    assert warned("--host", "0.0.0.0", *tls(keys))
    assert not warned("--host", "0.0.0.0", *tls(keys), "--tokens", str(keys / "tokens"))
    assert not warned("--host", "0.0.0.0", *tls(keys), "--tls-client-ca", str(keys / "ca.crt"))
    assert not warned()


def test_an_executor_dials_other_machines_with_keys_only() -> None:
    def load(*flags: str) -> None:
        load_executor_settings(["--model", "m", *flags])

    keys = ("--curve-key", "x", "--scheduler-key", "y")
    load("--scheduler", "tcp://127.0.0.1:1")
    for elsewhere in ("tcp://scheduler:50052", "tcp://10.0.0.7:1", "tcp://[2001:db8::1]:1"):
        with pytest.raises(ExecutorConfigError, match=r"--curve-key.*--insecure"):
            load("--scheduler", elsewhere)
        load("--scheduler", elsewhere, *keys)
        load("--scheduler", elsewhere, "--insecure")
    with pytest.raises(ExecutorConfigError, match="together"):
        load("--curve-key", "x")


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        ("scheduler_service", ("--host", "0.0.0.0"), "--host: 0.0.0.0"),
        ("scheduler_service", ("--port", "0", "--curve-key", "/no", "--executor-keys", "/no"), "/no"),
        ("executor_service", ("--scheduler", "tcp://scheduler:1"), "tcp://scheduler:1 is on another machine"),
        ("executor_service", ("--curve-key", "/no", "--scheduler-key", "/no"), "--curve-key, --scheduler-key: "),
    ],
)
def test_the_processes_end_with_one_line(module: str, flags: tuple[str, ...], words: str, checkpoint: Path) -> None:
    command = [sys.executable, "-m", module, "--model", str(checkpoint), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
