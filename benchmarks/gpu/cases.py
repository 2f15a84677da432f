"""Inputs for the kernels: random, from a seed. Small ones are the same for every device."""

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.paged_attention import AttentionPlan, plan_attention
from kernels.sampling import LogprobRequest, Penalties, SamplingBatch, TokenBias, TokenMask

_MANY = 1 << 20

_Batch = TypeVar("_Batch", bound=Any)


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Requests in a paged cache, blocks in random order, and the queries of a step."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    plan: AttentionPlan

    @property
    def scale(self) -> float:
        return float(self.query.shape[2] ** -0.5)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads and blocks of a model."""

    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16


def attention_case(
    lengths: list[tuple[int, int]],
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    padding: int = 0,
) -> AttentionCase:
    """``lengths``: (keys, query tokens) of each request. What no request has written is NaN."""
    blocks = [-(-length // shape.block_size) for length, _ in lengths]
    total = sum(blocks)
    ids = np.random.default_rng(seed).permutation(total).astype(np.int32)
    tables = np.full((len(lengths), max(blocks)), total, np.int32)
    line = (total + 1, shape.block_size, shape.kv_heads, shape.head_dim)
    caches = random((2, *line), device, dtype, seed)
    taken = 0
    for row, ((length, _), count) in enumerate(zip(lengths, blocks, strict=True)):
        tables[row, :count] = ids[taken : taken + count]
        taken += count
        used = length % shape.block_size
        if used:
            caches[:, int(tables[row, count - 1]), used:] = torch.nan
    caches[:, total] = torch.nan
    starts = np.concatenate([[0], np.cumsum([count for _, count in lengths])]).astype(np.int32)
    ends = np.array([length for length, _ in lengths], np.int32)
    tokens = int(starts[-1]) + padding
    query = random((tokens, shape.heads, shape.head_dim), device, dtype, seed + 1)
    plan = plan_attention(
        starts, ends, torch.from_numpy(tables).to(device), shape.block_size, shape.heads // shape.kv_heads
    )
    return AttentionCase(query, caches[0], caches[1], plan)


def attention_in_float64(case: AttentionCase) -> Tensor:
    """What attention of a case should give, by definition, request by request."""
    block_size, group = case.plan.block_size, case.plan.group_size
    outputs = []
    for row, length in enumerate(case.plan.seq_lens.tolist()):
        first, last = case.plan.query_start_loc[row : row + 2].tolist()
        if first == last:
            continue
        table = case.plan.block_tables[row, : -(-length // block_size)].long()
        keys, values = (
            cache[table].flatten(0, 1)[:length].double().repeat_interleave(group, dim=1)
            for cache in (case.key_cache, case.value_cache)
        )
        scores = torch.einsum("qhd,khd->hqk", case.query[first:last].double(), keys) * case.scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=keys.device).triu(length - (last - first) + 1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


def sampling_batch(rows: int, device: torch.device, *, filtered: bool, num_top: int | None = None) -> SamplingBatch:
    """Rows at temperature 0.8, with filters of all kinds if they are ``filtered``; what they sample from is reported
    if there is a ``num_top``."""
    generator = torch.Generator().manual_seed(rows)
    ones = torch.ones(rows)
    batch = SamplingBatch(
        temperature=ones * 0.8,
        top_k=torch.randint(0, 100, (rows,), generator=generator).int() * filtered,
        top_p=torch.rand(rows, generator=generator).clamp_(0.05, 0.99) if filtered else ones,
        seed=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        position=torch.randint(0, 1 << 20, (rows,), generator=generator),
        all_greedy=False,
        any_top_k=filtered,
        any_top_p=filtered,
        min_p=ones * 1e-6 if filtered else None,
        logprobs=None if num_top is None else LogprobRequest(torch.arange(rows), ones.bool(), num_top),
    )
    return to_device(batch, device)


def with_processors(batch: SamplingBatch, vocab_size: int) -> SamplingBatch:
    """A mask for every third row of a batch on the CPU, biases for the next, penalties for the next."""
    count, length, prompt = batch.temperature.shape[0], 300, 100
    masked, biased, penalised = (torch.arange(first, count, 3) for first in range(3))
    generator = torch.Generator().manual_seed(count)
    draw = partial(torch.randint, generator=generator)
    ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:8] for _ in biased])
    ones = torch.ones(penalised.shape[0])
    return replace(
        batch,
        position=draw(prompt, length, (count,)),  # the log must reach to it
        mask=TokenMask(masked, draw(-(2**31), 2**31, (masked.shape[0], -(-vocab_size // 32))).int()),
        bias=TokenBias(biased, ids.int(), torch.randn(ids.shape, generator=generator) * 4),
        penalties=Penalties(
            rows=penalised,
            repetition=ones * 1.3,
            frequency=ones * 0.2,
            presence=ones * 0.1,
            log=draw(0, vocab_size, (count, length)).int(),
            log_rows=penalised,
            prompt_lens=(ones * prompt).int(),
        ),
    )


def to_device(value: _Batch, device: torch.device) -> _Batch:
    """A batch, or a part of one, with all its tensors on ``device``."""
    moved: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            moved[field.name] = part.to(device)
        elif is_dataclass(part):
            moved[field.name] = to_device(part, device)
    return replace(value, **moved)


def random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers; many of them are drawn on the device, which is faster there."""
    source = device if math.prod(shape) > _MANY else torch.device("cpu")
    generator = torch.Generator(source).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=source) * scale).to(device, dtype)
