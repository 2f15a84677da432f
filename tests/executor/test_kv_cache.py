"""Sizes of the KV cache."""

import os
from pathlib import Path

import pytest
import torch

from executor_service.kv_cache import KVCache
from executor_service.models import load_config

from .builders import CPU, save_checkpoint


def test_sizes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3")
    config = load_config(tmp_path)
    cache = KVCache.allocate(config, 10, 16, CPU, torch.bfloat16)
    assert [tensor.shape for tensor in cache.keys] == [(11, 16, 2, 16)] * 2
    assert cache.dummy_block == 10
    stored = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert stored == 11 * KVCache.bytes_per_block(config, 16, torch.bfloat16)
    with pytest.raises(ValueError, match="at least one block"):
        KVCache.allocate(config, 0, 16, CPU, torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_touched_memory_is_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3")
    cache = KVCache.allocate(load_config(tmp_path), 16_384, 16, CPU, torch.bfloat16)
    stored = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    before = _resident_bytes()
    cache.touch()
    assert _resident_bytes() - before >= 0.9 * stored >= 32 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
