"""Groups of ``bench_kernels``: what works on keys, values and activations, each beside the machine's limit for it.

Shapes are those of a layer of Qwen3-0.6B. The limit of what is bound by memory is a plain read or copy of the same
bytes; that of prefill is the rate of a linear layer of many rows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.contenders import alternate, read, reference_kernels
from benchmarks.figures import emit
from benchmarks.machine import ForeignLoad
from kernels.kv_append import native as native_append
from kernels.linear import linear, pack
from kernels.native import memory
from kernels.paged_attention import paged_attention, plan_attention
from kernels.rms_norm import add_rms_norm
from kernels.rotary_append import Rotation, rotary_append

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 16, 8, 128, 1024
KV_SIZE = KV_HEADS * HEAD_DIM
BLOCK_SIZE, APPEND_BLOCKS = 16, 1024
DECODES = ((64, 512), (64, 256), (64, 128), (1, 4096))  # (requests, tokens that each has)
PREFILLS = ((0, 1024), (0, 256), (3072, 1024))  # (tokens before, tokens of the step) of one request
WORKING_SET = 1 << 28  # bytes, at least four times a usual last-level cache


def _caches(blocks: int) -> tuple[Tensor, Tensor]:
    """Keys and values of finite numbers, all memory in place."""
    shape = (blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    keys, values = (memory.zeros(shape, torch.bfloat16).normal_() for _ in range(2))
    return keys, values


def _attention(requests: int, before: int, tokens: int) -> tuple[Callable[[], Tensor], tuple[Tensor, Tensor]]:
    """A call in which each request computes ``tokens`` after ``before`` others, and the caches that it reads."""
    width = -(-(before + tokens) // BLOCK_SIZE)
    caches = _caches(requests * width)
    tables = torch.randperm(requests * width).view(requests, width).int()
    starts = np.arange(requests + 1, dtype=np.int32) * tokens
    lengths = np.full(requests, before + tokens, np.int32)
    plan = plan_attention(starts, lengths, tables, BLOCK_SIZE, HEADS // KV_HEADS)
    query = torch.randn(requests * tokens, HEADS, HEAD_DIM).bfloat16()
    return lambda: paged_attention(query, *caches, plan, HEAD_DIM**-0.5), caches


def bench_attention(repeats: int) -> None:
    """Decode, blocks in random order, against the reference and a plain read of the same keys and values."""
    for requests, context in DECODES:
        own, caches = _attention(requests, context - 1, 1)

        def reference(own: Callable[[], Tensor] = own) -> None:
            with reference_kernels():
                own()

        others = ForeignLoad()
        times = alternate({"own": own, "reference": reference, "read": partial(read, caches)}, repeats)
        emit(
            bench="attention decode",
            requests=requests,
            context=context,
            own_ms=times["own"],
            reference_ms=times["reference"],
            speedup=round(times["reference"] / times["own"], 1),
            read_ms=times["read"],
            share_of_bandwidth=round(times["read"] / times["own"], 2),
            foreign_cores=others.cores(),
        )


def bench_prefill(repeats: int) -> None:
    """One request's prompt, whole or after a part of it, against the rate of a linear layer."""
    weight, x = pack(torch.randn(4096, HIDDEN).bfloat16()), torch.randn(256, HIDDEN).bfloat16()
    for before, tokens in PREFILLS:
        own, _ = _attention(1, before, tokens)
        visible = before * tokens + tokens * (tokens + 1) / 2
        flops = {"own": 4 * visible * HEADS * HEAD_DIM, "linear": 2.0 * 256 * 4096 * HIDDEN}
        others = ForeignLoad()
        times = alternate({"own": own, "linear": partial(linear, x, weight, None, None)}, repeats)
        rates = {name: round(flops[name] / time / 1e6) for name, time in times.items()}
        emit(
            bench="attention prefill",
            before=before,
            tokens=tokens,
            own_ms=times["own"],
            own_gflops=rates["own"],
            linear_gflops=rates["linear"],
            share_of_linear=round(rates["own"] / rates["linear"], 2),
            foreign_cores=others.cores(),
        )


def bench_append(repeats: int) -> None:
    """Norms and rotation of queries and keys with the append, of decodes and of a prefill, all over some large caches.

    The limit is a copy of what is read and written: heads, and of the caches the lines that tokens lie in.
    """
    caches = [_caches(APPEND_BLOCKS) for _ in range(WORKING_SET // (2 * APPEND_BLOCKS * BLOCK_SIZE * KV_SIZE * 2))]
    norm = torch.ones(HEAD_DIM).bfloat16()
    for tokens, is_decode in ((64, True), (1024, False)):
        blocks = torch.randperm(APPEND_BLOCKS).view(-1, 64, 1)  # of each step
        offsets = torch.randint(BLOCK_SIZE, (64, 1)) if is_decode else torch.arange(BLOCK_SIZE)
        steps = (blocks * BLOCK_SIZE + offsets).flatten(1)
        heads = torch.randn(tokens, HEADS * HEAD_DIM + 2 * KV_SIZE).bfloat16().unflatten(1, (-1, HEAD_DIM))
        query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        angles = torch.randn(tokens, HEAD_DIM // 2)
        rotation = Rotation(angles.cos(), angles.sin(), norm, norm, 1e-6)
        # A token's key lies in all lines of a tile, its value in an eighth of them; a prefill's tokens share them.
        touched = tokens * KV_SIZE * (BLOCK_SIZE + 2 if is_decode else 2) + tokens * HEADS * HEAD_DIM
        source = memory.zeros((len(steps) * len(caches), touched), torch.bfloat16).normal_()
        target = torch.empty_like(source)
        own = partial(_append, caches, steps, query, key, value, rotation)
        others = ForeignLoad()
        times = alternate({"own": own, "copy": partial(target.copy_, source)}, repeats)
        emit(
            bench="append",
            tokens=tokens,
            own_us=round(times["own"] / len(source) * 1e3),
            copy_us=round(times["copy"] / len(source) * 1e3),
            share_of_bandwidth=round(times["copy"] / times["own"], 2),
            foreign_cores=others.cores(),
        )


def _append(
    caches: Sequence[tuple[Tensor, Tensor]],
    steps: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
) -> None:
    for slots in steps:
        for keys, values in caches:
            rotary_append(query, key, value, rotation, keys, values, slots, native_append.kv_append)


def bench_norm(repeats: int) -> None:
    """Residual addition and norm against copies of two tensors, which read and write as much."""
    rows = WORKING_SET // (4 * HIDDEN * 2)
    x, residual = (memory.zeros((rows, HIDDEN), torch.bfloat16).normal_() for _ in range(2))
    weight = torch.ones(HIDDEN).bfloat16()
    others = ForeignLoad()
    own = partial(add_rms_norm, x, residual, weight, 1e-6)
    times = alternate({"own": own, "copy": lambda: (x.clone(), residual.clone())}, repeats)
    emit(
        bench="norm",
        rows=rows,
        own_ms=times["own"],
        copy_ms=times["copy"],
        share_of_bandwidth=round(times["copy"] / times["own"], 2),
        foreign_cores=others.cores(),
    )
