"""Random requests in a paged cache full of NaN, as stale memory may be."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.kv_append import reference
from kernels.paged_attention import AttentionPlan, plan_attention


@dataclass(frozen=True)
class Paged:
    """A step on such a cache."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    plan: AttentionPlan

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan, float]:
        return self.query, self.key_cache, self.value_cache, self.plan, float(self.query.shape[2] ** -0.5)


class Requests:
    """Requests with random queries, keys and values at every position, of which steps compute parts."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_heads, kv_heads = heads
        blocks = [-(-length // block_size) for length in lengths]
        self.dummy = sum(blocks) + 3
        self.block_size, self.group = block_size, num_heads // kv_heads
        shape = (2, self.dummy + 1, block_size, kv_heads, head_dim)
        self.caches = torch.full(shape, torch.nan, dtype=dtype)
        ids = np.random.default_rng(seed).permutation(self.dummy)
        self.tables = np.full((len(lengths), max(blocks)), self.dummy, np.int32)
        self.queries = []
        for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
            self.tables[row, :count], ids = ids[:count], ids[count:]
            at = np.arange(length)
            slots = self.tables[row, at // block_size].astype(np.int64) * block_size + at % block_size
            keys, values = torch.randn(2, length, kv_heads, head_dim, generator=generator).to(dtype)
            reference.kv_append(keys, values, self.caches[0], self.caches[1], torch.from_numpy(slots))
            self.queries.append(torch.randn(length, num_heads, head_dim, generator=generator).to(dtype))

    def step(self, parts: Sequence[tuple[int, int, int]], padding: int = 0, padded_requests: int = 0) -> Paged:
        """A step that computes ``count`` positions of each (request, count, end)."""
        counts = [count for _, count, _ in parts] + [0] * padded_requests
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        ends = np.array([end for *_, end in parts] + [0] * padded_requests, np.int32)
        tables = np.full((len(counts), self.tables.shape[1]), self.dummy, np.int32)
        tables[: len(parts)] = self.tables[[row for row, *_ in parts]]
        real = [self.queries[row][end - count : end] for row, count, end in parts]
        query = torch.cat([*real, torch.full((padding, *self.queries[0].shape[1:]), torch.nan).to(real[0])])
        plan = plan_attention(starts, ends, torch.from_numpy(tables), self.block_size, self.group)
        return Paged(query, self.caches[0], self.caches[1], plan)
