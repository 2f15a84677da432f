"""``baton models``, ``baton version``, and what every ``--help`` shows."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.checkpoints.shapes import SHAPES
from baton.cli import app
from tests.client.test_cli import run


@pytest.fixture
def no_torch(tmp_path: Path) -> str:
    """A PYTHONPATH on which torch is not installed."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    return str(tmp_path)


def test_list_needs_no_torch(no_torch: str) -> None:
    done = run("models", "list", PYTHONPATH=no_torch, COLUMNS="40")
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = (line.split() for line in done.stdout.splitlines())
    assert header[:2] == ["shape", "family"]
    assert [row[0] for row in rows] == list(SHAPES)
    assert rows[-1] == ["qwen3-8b", "qwen3", "36", "4096", "32", "8", "40960", "8,190.7", "M", "16.4", "GB"]


def test_make(tmp_path: Path) -> None:
    directory = tmp_path / "made"
    done = run("models", "make", "qwen3-tiny", str(directory), "--dtype", "float32")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{directory}: qwen3-tiny, float32, 1.8 MB of weights")
    weights = (directory / "model.safetensors").read_bytes()
    again = run("models", "make", "qwen3-tiny", str(directory))
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"error: {directory} holds a checkpoint already; --force replaces it\n"
    assert run("models", "make", "qwen3-tiny", str(directory), "--seed", "3", "--force").returncode == 0
    assert (directory / "model.safetensors").read_bytes() != weights


def test_make_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = run("models", "make", "qwen3-tiny", str(tmp_path), "--force")
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path} exists and is not a checkpoint directory\n")
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_make_without_torch(no_torch: str, tmp_path: Path) -> None:
    done = run("models", "make", "qwen3-tiny", str(tmp_path / "made"), PYTHONPATH=no_torch)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: torch is not installed here: pip install 'baton[executor]'\n"


def test_an_unknown_shape(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["models", "make", "qwen9", str(tmp_path / "made")])
    assert done.exit_code == 2
    assert "qwen3-tiny" in done.stderr


def test_version() -> None:
    assert run("version").stdout == run("--version").stdout


@pytest.mark.parametrize(
    "command", [("generate",), ("chat",), ("status",), ("cluster",), ("models",), ("models", "make"), ("version",)]
)
def test_help_has_examples(command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"], prog_name="baton")
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"Usage: baton {' '.join(command)}" in done.stdout and "\x1b" not in done.stdout
    if command != ("version",):
        examples = done.stdout.partition("Examples:")[2]
        assert f"baton {' '.join(command)}" in examples
