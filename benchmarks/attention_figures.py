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
from kernels.native.recording import record
from kernels.paged_attention import paged_attention, plan_attention
from kernels.rms_norm import add_rms_norm
from kernels.rotary_append import Rotation, rotary_append

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 16, 8, 128, 1024
KV_SIZE = KV_HEADS * HEAD_DIM
BLOCK_SIZE, APPEND_BLOCKS = 16, 1024
DECODES = ((64, 512), (64, 256), (64, 128), (16, 256), (1, 4096))  # (requests, tokens that each has)
PREFILLS = ((0, 1024), (0, 256), (3072, 1024))  # (tokens before, tokens of the step) of one request
WORKING_SET = 1 << 28  # bytes, at least four times a usual last-level cache


def _caches(blocks: int) -> tuple[Tensor, Tensor]:
    """Keys and values of finite numbers, all memory in place."""
    shape = (blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    keys, values = (memory.zeros(shape, torch.bfloat16).normal_() for _ in range(2))
    return keys, values


def _attention(
    requests: int, before: int, tokens: int, layers: int = 1
) -> tuple[Callable[[], None], list[tuple[Tensor, Tensor]]]:
    """A call in which each request computes ``tokens`` after ``before`` others in each layer; the layers' caches."""
    width = -(-(before + tokens) // BLOCK_SIZE)
    caches = [_caches(requests * width) for _ in range(layers)]
    tables = torch.randperm(requests * width).view(requests, width).int()
    starts = np.arange(requests + 1, dtype=np.int32) * tokens
    lengths = np.full(requests, before + tokens, np.int32)
    plan = plan_attention(starts, lengths, tables, BLOCK_SIZE, HEADS // KV_HEADS)
    query = torch.randn(requests * tokens, HEADS, HEAD_DIM).bfloat16()

    def attend() -> None:
        for keys, values in caches:
            paged_attention(query, keys, values, plan, HEAD_DIM**-0.5)

    return attend, caches


def bench_attention(repeats: int) -> None:
    """Decode of a layer, blocks in random order, against the reference and a plain read of the same keys and values.

    Layers are taken by turns, so many that no cache holds them.
    """
    for requests, context in DECODES:
        layers = max(1, WORKING_SET // (requests * context * 2 * KV_SIZE * 2))
        own, caches = _attention(requests, context - 1, 1, layers)

        def reference(own: Callable[[], None] = own) -> None:
            with reference_kernels():
                own()

        tensors = [tensor for pair in caches for tensor in pair]
        others = ForeignLoad()
        times = alternate({"own": own, "reference": reference, "read": partial(read, tensors)}, repeats)
        own_ms, reference_ms, read_ms = (times[name] / layers for name in ("own", "reference", "read"))
        emit(
            bench="attention decode",
            requests=requests,
            context=context,
            own_ms=round(own_ms, 3),
            reference_ms=round(reference_ms, 3),
            speedup=round(reference_ms / own_ms, 1),
            read_ms=round(read_ms, 3),
            share_of_bandwidth=round(read_ms / own_ms, 2),
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

    The limit is a copy of what is read and written: heads, and of the caches the lines that tokens lie in. Calls are
    recorded as in a step.
    """
    caches = [_caches(APPEND_BLOCKS) for _ in range(WORKING_SET // (2 * APPEND_BLOCKS * BLOCK_SIZE * KV_SIZE * 2))]
    norm = torch.ones(HEAD_DIM).bfloat16()
    for tokens, is_decode in ((64, True), (1024, False)):
        blocks = torch.randperm(APPEND_BLOCKS).view(-1, 64, 1)  # of each step
        offsets = torch.randint(BLOCK_SIZE, (64, 1)) if is_decode else torch.arange(BLOCK_SIZE)
        steps = (blocks * BLOCK_SIZE + offsets).flatten(1)
        heads = torch.randn(tokens, HEADS * HEAD_DIM + 2 * KV_SIZE).bfloat16().view(tokens, -1, HEAD_DIM)
        query, key, value = torch.split(heads, [HEADS, KV_HEADS, KV_HEADS], 1)
        angles = torch.randn(tokens, HEAD_DIM // 2)
        rotation = Rotation(angles.cos(), angles.sin(), norm, norm, 1e-6)
        # A token's key lies in all lines of a tile, its value in an eighth of them; a prefill's tokens share them.
        touched = tokens * KV_SIZE * (BLOCK_SIZE + 2 if is_decode else 2) + tokens * HEADS * HEAD_DIM
        source = memory.zeros((len(steps) * len(caches), touched), torch.bfloat16).normal_()
        target = torch.empty_like(source)
        own = record(partial(_append, caches, steps, query, key, value, rotation), memory.Scratch())
        others = ForeignLoad()
        times = alternate({"own": own.run, "copy": partial(target.copy_, source)}, repeats)
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
) -> tuple[Tensor, ...]:
    for slots in steps:
        for keys, values in caches:
            rotary_append(query, key, value, rotation, keys, values, slots, native_append.kv_append)
    return ()


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
