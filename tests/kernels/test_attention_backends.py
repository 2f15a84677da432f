"""Which attention backend is chosen, and why."""

import logging
from typing import get_args

import pytest
import torch

from executor_service.config import ExecutorSettings
from kernels.gpu import library
from kernels.native.library import available
from kernels.paged_attention import flash
from kernels.paged_attention.backends import (
    AttentionShape,
    BackendError,
    BackendName,
    choose_backend,
    default_block_size,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def shape(
    device: torch.device = CPU, dtype: torch.dtype = torch.float32, block_size: int = 16, **more: bool
) -> AttentionShape:
    return AttentionShape(device, dtype, 64, block_size, **more)


def test_the_cpu_has_two(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kernels.paged_attention.backends")
    assert choose_backend("auto", shape()).name == "reference"
    assert choose_backend("reference", shape(dtype=torch.bfloat16)).name == "reference"
    best = "native" if available() else "reference"
    assert choose_backend("auto", shape(dtype=torch.bfloat16)).name == best
    assert len(caplog.records) == 3
    assert "not native: needs bfloat16" in caplog.records[0].message
    assert "not triton: needs a GPU" in caplog.records[0].message
    for name in ("native", "triton", "flash"):
        with pytest.raises(BackendError, match=f"{name}: needs"):
            choose_backend(name, shape())


def test_flash_takes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version 2 reads blocks of a multiple of 256 tokens only, and no version is exact."""
    monkeypatch.setattr(flash, "installed", lambda: "flash_attn")
    half = {"device": CUDA, "dtype": torch.bfloat16}
    assert choose_backend("flash", shape(**half, block_size=512)).name == "flash"
    assert choose_backend("auto", shape(**half, block_size=256)).name == "flash"
    for refused, why in (
        (shape(**half), "multiple of 256"),
        (shape(**half, block_size=256, exact=True), "depend on its batch"),
        (shape(CUDA, torch.float32, 256), "needs bfloat16"),
    ):
        with pytest.raises(BackendError, match=why):
            choose_backend("flash", refused)
        assert choose_backend("auto", refused).name == "triton"
    monkeypatch.setattr(flash, "installed", lambda: "flash_attn_interface")
    assert choose_backend("flash", shape(**half)).name == "flash"
    assert choose_backend("auto", shape(**half)).name != "flash"
    monkeypatch.setattr(flash, "installed", lambda: None)
    assert choose_backend("auto", shape(**half)).name == "triton"


def test_blocks_are_what_flash_can_read_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, size in (("flash_attn", 256), ("flash_attn_interface", 16), (None, 16)):
        monkeypatch.setattr(flash, "installed", lambda package=package: package)
        assert default_block_size("flash") == size
        assert default_block_size("auto") == 16


def test_exactness_needs_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = shape(CUDA, torch.bfloat16, exact=True)
    assert choose_backend("auto", wanted).name == "triton"
    monkeypatch.setattr(library, "available", lambda: False)
    with pytest.raises(BackendError, match=r"not triton: .*; not reference: a row.s bits depend"):
        choose_backend("auto", wanted)
    assert choose_backend("auto", shape(CUDA, torch.bfloat16)).name == "reference"
    assert choose_backend("auto", shape(exact=True)).name == "reference"


def test_settings_know_all_names() -> None:
    annotation = ExecutorSettings.model_fields["attention_backend"].annotation
    assert set(get_args(annotation)) == set(get_args(BackendName))
