"""Sizes of the KV cache."""

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
