"""Settings: precedence, errors in one line, help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from executor_service.config import ConfigError, load_settings

ROOT = Path(__file__).parents[2]


def test_defaults() -> None:
    settings = load_settings(["--model", "m"])
    assert settings.scheduler == "tcp://127.0.0.1:50052"
    assert (settings.block_size, settings.max_rows, settings.max_batched_tokens) == (None, 256, 2048)
    assert settings.kv_memory is settings.num_blocks is settings.max_model_len is None
    assert settings.identity.endswith(f"-{os.getpid()}")
    assert not settings.die_with_parent


def test_flags_override_environment_overrides_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "executor.toml"
    file.write_text('model = "from-file"\nblock_size = 4\nmax_rows = 4\nkv_memory = "2GiB"\n')
    monkeypatch.setenv("BATON_EXECUTOR_BLOCK_SIZE", "8")
    monkeypatch.setenv("BATON_EXECUTOR_MAX_ROWS", "8")
    settings = load_settings([f"--config={file}", "--max-rows", "16", "--die-with-parent"])
    assert settings.model == Path("from-file")
    assert (settings.block_size, settings.max_rows, settings.kv_memory) == (8, 16, 2 << 30)
    assert settings.die_with_parent


def test_file_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "executor.toml"
    file.write_text('model = "from-file"')
    monkeypatch.setenv("BATON_EXECUTOR_CONFIG", str(file))
    assert load_settings([]).model == Path("from-file")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model: Field required"),
        (["--model", "m", "--block-size", "0"], "--block-size: Input should be greater than"),
        (["--model", "m", "--block-size", "x"], "--block-size: Input should be a valid integer"),
        (["--model", "m", "--device", "tpu"], "--device"),
        (["--model", "m", "--kv-memory", "lots"], "--kv-memory"),
        (["--model", "m", "--executor-id", ""], "--executor-id"),
        (["--model", "m", "--wings", "2"], "--wings"),
        (["--model", "m", "--config", "/nowhere"], "cannot read /nowhere: No such file"),
    ],
)
def test_errors_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_settings(flags)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_file(tmp_path: Path) -> None:
    file = tmp_path / "executor.toml"
    file.write_text("model = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_settings(["--config", str(file)])
    file.write_text('model = "m"\nwings = 2')
    with pytest.raises(ConfigError, match="--wings"):
        load_settings(["--config", str(file)])


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "executor_service", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)


def test_help_names_every_flag() -> None:
    help_text = run("--help")
    assert help_text.returncode == 0
    assert help_text.stderr == ""
    for flag in ("--scheduler", "--model", "--executor-id", "--kv-memory", "--num-blocks", "--die-with-parent"):
        assert flag in help_text.stdout
    assert "90% of free VRAM" in " ".join(help_text.stdout.split())


def test_wrong_flags_exit_with_2_and_one_line() -> None:
    failed = run("--max-rows", "none")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
