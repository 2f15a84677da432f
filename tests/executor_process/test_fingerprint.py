"""Fingerprints: equal for equal arithmetic, different for anything else."""

import json
from pathlib import Path

import pytest
import torch

from executor_service.fingerprint import kernel_fingerprint, model_fingerprint


def write_checkpoint(path: Path, *, name: str = "model.safetensors", shape: int = 2, tail: bytes = b"\0" * 8) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [shape], "data_offsets": [0, 8]}}).encode()
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / name).write_bytes(len(header).to_bytes(8, "little") + header + tail)
    return path


def test_golden(tmp_path: Path) -> None:
    digest = "acf9edb187a44a8ec682c6249b3d9280077a26906e2f2d69e01f1792909911d8"
    assert model_fingerprint(write_checkpoint(tmp_path)) == digest
    assert model_fingerprint(write_checkpoint(tmp_path / "elsewhere")) == digest


def test_every_part_counts(tmp_path: Path) -> None:
    prints = {
        model_fingerprint(write_checkpoint(tmp_path / "a")),
        model_fingerprint(write_checkpoint(tmp_path / "b", name="other.safetensors")),
        model_fingerprint(write_checkpoint(tmp_path / "c", shape=1)),
        model_fingerprint(write_checkpoint(tmp_path / "d", tail=b"\0" * 9)),
    }
    two_files = write_checkpoint(tmp_path / "e")
    write_checkpoint(two_files, name="second.safetensors")
    prints.add(model_fingerprint(two_files))
    other_config = write_checkpoint(tmp_path / "f")
    (other_config / "config.json").write_text('{"a": 1}')
    prints.add(model_fingerprint(other_config))
    prints.add(model_fingerprint(tmp_path / "a", "int8"))
    assert len(prints) == 7


def test_damaged_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not a safetensors file"):
        model_fingerprint(tmp_path)


def test_kernel_fingerprint() -> None:
    cpu = torch.device("cpu")
    threads = torch.get_num_threads()
    first = kernel_fingerprint(cpu, torch.bfloat16, 16, "native")
    torch.set_num_threads(threads + 1)
    try:
        assert kernel_fingerprint(cpu, torch.bfloat16, 16, "native") == first
    finally:
        torch.set_num_threads(threads)
    other = kernel_fingerprint(cpu, torch.bfloat16, 32, "native")
    assert kernel_fingerprint(cpu, torch.float32, 16, "native") != first != other
    assert "dtype=bfloat16 block=16" in first
    assert kernel_fingerprint(cpu, torch.bfloat16, 16, "reference") != first
