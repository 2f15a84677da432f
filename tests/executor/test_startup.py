"""Options of the model runner on their way from the settings to the fingerprint."""

from pathlib import Path

import pytest
import torch

from executor_service import recorded_steps, startup
from executor_service.config import ConfigError, ExecutorSettings
from executor_service.startup import prepare
from kernels.native.library import available

from .builders import save_checkpoint


def settings(checkpoint: Path, **options: str | bool) -> ExecutorSettings:
    return ExecutorSettings(model=checkpoint, device="cpu", num_blocks=8, max_model_len=64, max_rows=2, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("startup")
    save_checkpoint(path, "qwen3")
    return path


@pytest.mark.parametrize(
    ("options", "attention"),
    [
        ({"dtype": "float32"}, "reference"),
        ({"dtype": "bfloat16"}, "native" if available() else "reference"),
        ({"dtype": "bfloat16", "attention_backend": "reference"}, "reference"),
        ({"dtype": "float32", "exact": True}, "reference"),  # as always on a CPU
    ],
)
def test_the_backend_is_part_of_the_fingerprint(
    checkpoint: Path, options: dict[str, str | bool], attention: str
) -> None:
    _, capacity, _, graphs = prepare(settings(checkpoint, **options))
    assert f"attention={attention} " in capacity.kernel_fingerprint
    assert "exact" in capacity.features
    assert graphs is None  # there are none on a CPU


def test_an_impossible_backend_is_one_line(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="--attention-backend: triton: needs a GPU"):
        prepare(settings(checkpoint, dtype="float32", attention_backend="triton"))


def test_too_many_blocks_are_one_line(checkpoint: Path) -> None:
    options = settings(checkpoint, dtype="float32").model_copy(update={"num_blocks": 1 << 45})
    with pytest.raises(ConfigError, match=f"^{1 << 45} KV blocks do not fit into the memory of cpu$"):
        prepare(options)


@pytest.mark.skipif(not available(), reason="no native kernels")
def test_no_room_for_the_largest_step_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now, and not when enough callers have come."""
    monkeypatch.setattr(recorded_steps, "available_ram", lambda: 1 << 20)
    with pytest.raises(ConfigError, match=r"^--max-batched-tokens, --max-rows: the largest step does not fit beside"):
        prepare(settings(checkpoint, dtype="bfloat16"))


def test_weights_that_do_not_fit_are_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has an error of its own for a device's memory."""

    def load(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(startup, "load_model", load)
    with pytest.raises(ConfigError, match=r"^--model: the weights do not fit: CUDA out of memory\. Tried"):
        prepare(settings(checkpoint, dtype="float32"))


@pytest.mark.skipif(not available(), reason="no native kernels")
def test_int8_weights_are_another_model(checkpoint: Path) -> None:
    """A scheduler refuses executors of another model: no stream goes from these weights to those."""
    _, plain, _, _ = prepare(settings(checkpoint, dtype="bfloat16"))
    _, quantised, _, _ = prepare(settings(checkpoint, dtype="bfloat16", quantization="int8"))
    assert plain.model_fingerprint != quantised.model_fingerprint


def test_int8_weights_without_kernels_are_one_line(checkpoint: Path) -> None:
    message = r"^--quantization: int8 needs native kernels, .* here: reference \(cpu float32\)$"
    with pytest.raises(ConfigError, match=message):
        prepare(settings(checkpoint, dtype="float32", quantization="int8"))
