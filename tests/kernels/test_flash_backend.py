"""How flash-attn is called: its two packages' documented functions, computed in torch, see what they must see.

The packages themselves need a GPU; ``make gpu-check`` runs them where they are installed.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.paged_attention import flash, plan_attention, reference
from tests.kernels.paged import Requests


def attend(query: torch.Tensor, caches: Any, starts: Any, lengths: Any, tables: torch.Tensor, scale: float) -> Any:
    """Causal attention aligned to the last key, per request; rows of no request are left as they come."""
    starts, lengths = starts.int().numpy(), lengths.int().numpy()
    plan = plan_attention(starts, lengths, tables, caches[0].shape[1], query.shape[1] // caches[0].shape[2])
    output = reference.paged_attention(query, *caches, plan, scale)
    output[plan.num_tokens :] = torch.nan
    return output


def with_kvcache(q: torch.Tensor, k_cache: Any, v_cache: Any, tables: Any, lengths: Any, scale: float) -> torch.Tensor:
    assert q.dim() == 4
    assert q.shape[:2] == (lengths.shape[0], 1)
    starts = torch.arange(len(lengths) + 1)
    has_keys = lengths > 0  # requests without keys come out as zeros
    output = attend(q.squeeze(1), (k_cache, v_cache), starts, lengths.clamp(min=1), tables, scale)
    return torch.where(has_keys[:, None, None], output, 0).unsqueeze(1)


def flash_2() -> SimpleNamespace:
    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        softmax_scale: float, causal: bool, block_table: torch.Tensor,
    ) -> Any:  # fmt: skip
        assert causal
        assert k.shape[1] % 256 == 0
        lengths = cu_seqlens_k.diff()
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        assert max_seqlen_k >= int(lengths.max())
        return attend(q, (k, v), cu_seqlens_q, lengths, block_table, softmax_scale)

    def flash_attn_with_kvcache(
        q: Any, k_cache: Any, v_cache: Any, *, cache_seqlens: Any, block_table: Any, softmax_scale: float, causal: bool
    ) -> Any:
        return with_kvcache(q, k_cache, v_cache, block_table, cache_seqlens, softmax_scale)

    return SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache
    )


def flash_3() -> SimpleNamespace:
    def flash_attn_with_kvcache(
        q: Any, k_cache: Any, v_cache: Any, *, cache_seqlens: Any, page_table: Any, softmax_scale: float, causal: bool,
        cu_seqlens_q: Any = None, max_seqlen_q: int | None = None,
    ) -> Any:  # fmt: skip
        assert causal
        if cu_seqlens_q is None:
            return with_kvcache(q, k_cache, v_cache, page_table, cache_seqlens, softmax_scale)
        assert max_seqlen_q is not None
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        return attend(q, (k_cache, v_cache), cu_seqlens_q, cache_seqlens, page_table, softmax_scale)

    return SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)


@pytest.mark.parametrize(("name", "package"), [("flash_attn", flash_2()), ("flash_attn_interface", flash_3())])
def test_calls(name: str, package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "installed", lambda: name)
    monkeypatch.setattr(flash, "_package", lambda: package)
    requests = Requests([300, 20, 7], block_size=256)
    for parts, padding in (
        ([(0, 1, 300), (1, 1, 20)], 0),
        ([(0, 1, 300), (1, 1, 20), (2, 1, 7)], 3),
        ([(0, 40, 290), (1, 1, 20), (2, 7, 7)], 2),
    ):
        step = requests.step(parts, padding=padding)
        output = flash.paged_attention(*step.arguments)
        assert output.shape == step.query.shape
        assert torch.equal(output, reference.paged_attention(*step.arguments))  # zeros for padding


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for modules that nobody has looked for yet."""
    monkeypatch.syspath_prepend(tmp_path)
    flash.installed.cache_clear()
    yield tmp_path
    for name in ("flash_attn", "flash_attn_interface"):
        sys.modules.pop(name, None)
    flash.installed.cache_clear()


def test_a_package_that_cannot_be_imported_is_none(packages: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As one is that was built for another torch."""
    (packages / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEa')")
    importlib.invalidate_caches()
    assert flash.installed() is None
    assert "flash_attn is installed but cannot be used: undefined symbol" in caplog.text


def test_packages_are_looked_for_once(packages: Path) -> None:
    """Every layer of a step asks which it is, and the import path is long."""
    assert flash.installed() is None
    (packages / "flash_attn_interface.py").touch()
    importlib.invalidate_caches()
    assert flash.installed() is None
    flash.installed.cache_clear()
    assert flash.installed() == "flash_attn_interface"
