"""Every Triton kernel against float64 references on random inputs; the interpreter stands in for the GPU on a CPU."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.cases import (
    AttentionShape,
    attention_case,
    attention_in_float64,
    random,
    sampling_batch,
    to_device,
    with_processors,
)
from benchmarks.gpu.records import Record, check, guarded, relative_error

_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # |out - ref| / |ref|


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """What kernels are checked in; the interpreter cannot multiply bfloat16."""
    every = [torch.float32, torch.float16, torch.bfloat16]
    return every if device.type == "cuda" else every[:2]


def check_kernels(device: torch.device) -> Iterator[Record]:
    """One record per kernel and type: its largest error over all shapes."""
    for dtype in dtypes_of(device):
        for name, errors in (
            ("attention", _attention_errors(device, dtype)),
            ("flash attention", _flash_errors(device, dtype)),
            ("far blocks", _far_errors(device, dtype)),
            ("linear", _linear_errors(device, dtype)),
            ("rms_norm", _norm_errors(device, dtype)),
            ("rotary_append", _rotary_errors(device, dtype)),
            ("silu_and_mul", _activation_errors(device, dtype)),
        ):
            yield from guarded(name, _worst(name, errors, dtype), dtype=_name_of(dtype))
    yield from guarded("sample", _check_sampling(device))


def _worst(name: str, errors: Iterator[float], dtype: torch.dtype) -> Iterator[Record]:
    worst = max(errors, default=None)
    if worst is not None:
        yield check(name, worst < _LIMITS[dtype], dtype=_name_of(dtype), error=worst)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention_errors(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    from kernels.paged_attention import gpu

    small = device.type == "cpu"
    batches = [
        [(300, 1), (5, 1)] if small else [(4000, 1), (1, 1), (777, 1), *((100 + 61 * i, 1) for i in range(60))],
        [(70, 9), (33, 1), (40, 40)] if small else [(1500, 1024), (900, 1), (333, 333), (4096, 7), (64, 64)],
    ]
    shapes = [AttentionShape(4, 2, 20, 16)] if small else []
    if not small:
        shapes = [AttentionShape(), AttentionShape(14, 2, 64, 256), AttentionShape(5, 5, 80, 1)]
    for shape in shapes:
        for lengths in batches:
            case = attention_case(lengths, shape, device, dtype, padding=5)
            expected = attention_in_float64(case)
            arguments = (case.query, case.key_cache, case.value_cache, case.plan, case.scale)
            for side_by_side in (False, True):
                for exact in (False, True):
                    output = gpu.paged_attention(*arguments, exact=exact, side_by_side=side_by_side)
                    padding = output[case.plan.num_tokens :]
                    yield float("inf") if bool(padding.any()) else 0.0
                    yield relative_error(output[: case.plan.num_tokens], expected)


def _flash_errors(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """flash-attn, where it is installed; it promises nothing about what lies beside the keys that are written."""
    from kernels.paged_attention import flash

    if device.type == "cpu" or dtype == torch.float32 or flash.installed() is None:
        return
    shape = AttentionShape(block_size=max(16, flash.block_multiple()))
    for lengths in ([(4000, 1), (1, 1), (777, 1)], [(1500, 1024), (900, 1), (333, 333), (4096, 7)]):
        case = attention_case(lengths, shape, device, dtype, padding=5)
        keys, values = (cache.nan_to_num() for cache in (case.key_cache, case.value_cache))
        output = flash.paged_attention(case.query, keys, values, case.plan, case.scale)
        yield float("inf") if bool(output[case.plan.num_tokens :].any()) else 0.0
        yield relative_error(output[: case.plan.num_tokens], attention_in_float64(case))


def _far_errors(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Blocks past 2^31 elements are written and read like the first ones, bit by bit."""
    from kernels.kv_append import gpu as append
    from kernels.paged_attention import gpu, plan_attention

    if dtype == torch.float32:
        return
    size, kv_heads, dim = (16, 8, 128) if device.type == "cuda" else (16, 1, 16)
    blocks = 2**31 // (size * kv_heads * dim) + 100 if device.type == "cuda" else 20
    used, tokens = 7, 100
    caches = torch.zeros((2, blocks, size, kv_heads, dim), device=device, dtype=dtype)
    query = random((tokens, 2 * kv_heads, dim), device, dtype, 0)
    key, value = (random((tokens, kv_heads, dim), device, dtype, seed) for seed in (1, 2))
    outputs = []
    for first in (0, blocks - used):
        slots = torch.arange(tokens, device=device) + first * size
        append.kv_append(key, value, caches[0], caches[1], slots)
        table = torch.arange(first, first + used, device=device, dtype=torch.int32).unsqueeze(0)
        plan = plan_attention(np.array([0, tokens], np.int32), np.array([tokens], np.int32), table, size, 2)
        outputs.append(gpu.paged_attention(query, caches[0], caches[1], plan, dim**-0.5))
    yield 0.0 if torch.equal(*outputs) and bool(outputs[0].any()) else float("inf")


def _linear_errors(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    from kernels.linear import gpu

    sizes = [(3, 50, 70)] if device.type == "cpu" else [(1, 4096, 1024), (300, 1000, 1027), (64, 12288, 4096)]
    for m, n, k in sizes:
        x, weight, bias = (random(size, device, dtype, seed) for seed, size in enumerate([(m, k), (n, k), (n,)]))
        expected = x.double() @ weight.double().T + bias.double()
        yield relative_error(gpu.linear(x, weight, bias, dtype), expected)


def _norm_errors(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    from kernels.rms_norm import gpu

    for rows, size in [(3, 70)] if device.type == "cpu" else [(1, 1024), (513, 4096), (7, 5001)]:
        x, residual = random((rows, size), device, dtype, 0), random((rows, size), device, dtype, 1)
        weight = random((size,), device, dtype, 2)
        output, total = gpu.add_rms_norm(x, residual, weight, 1e-6)
        exact = (x + residual).double()
        yield 0.0 if torch.equal(total, x + residual) else float("inf")
        yield relative_error(output, exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double())


def _rotary_errors(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    from kernels.rotary_append import Rotation, gpu

    tokens, heads, kv_heads, dim = (5, 4, 2, 20) if device.type == "cpu" else (700, 32, 8, 128)
    fused = random((tokens, heads + 2 * kv_heads, dim), device, dtype, 0)
    query, key, value = torch.split(fused, [heads, kv_heads, kv_heads], dim=1)
    norm = random((dim,), device, dtype, 1)
    angles = random((tokens, dim // 2), device, torch.float32, 2, scale=10.0)
    slots = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(3))[:tokens].to(device)
    for norms in ((None, None), (norm, norm)):
        caches = torch.zeros((2, tokens + 9, 1, kv_heads, dim), device=device, dtype=dtype)
        rotation = Rotation(angles.cos(), angles.sin(), norms[0], norms[1], 1e-6)
        rotated = gpu.rotary_append(query, key, value, rotation, caches[0], caches[1], slots)
        yield relative_error(rotated, _rotated(query, norms[0], angles))
        yield relative_error(caches[0, slots, 0], _rotated(key, norms[1], angles))
        yield 0.0 if torch.equal(caches[1, slots, 0], value) else float("inf")


def _rotated(heads: Tensor, norm: Tensor | None, angles: Tensor) -> Tensor:
    wide = heads.double()
    if norm is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    first, second = wide.chunk(2, dim=-1)
    cos, sin = angles.cos().double().unsqueeze(1), angles.sin().double().unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _activation_errors(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    from kernels.activation import gpu

    for rows, size in [(3, 70)] if device.type == "cpu" else [(1, 3072), (513, 12288), (7, 5001)]:
        gate_up = random((rows, 2 * size), device, dtype, 0, scale=4.0)
        gate, up = gate_up.double().chunk(2, dim=-1)
        yield relative_error(gpu.silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up)


def _check_sampling(device: torch.device) -> Iterator[Record]:
    """Tokens and log probabilities against the composed sampler on the CPU: rounding may move a border now and then."""
    from kernels.sampling import composed, gpu

    rows, vocab_size = (3, 500) if device.type == "cpu" else (64, 151_936)
    logits = torch.randn((rows, vocab_size), generator=torch.Generator().manual_seed(0)) * 3
    for name, filtered, processed in (
        ("sample", False, False),
        ("sample filtered", True, False),
        ("sample processed", False, True),
    ):
        batch = sampling_batch(rows, torch.device("cpu"), filtered=filtered, num_top=1)
        if processed:
            batch = with_processors(batch, vocab_size)
        expected = composed.sample(logits, batch)
        sampled = gpu.sample(logits.to(device), to_device(batch, device))
        different = int((sampled.token_ids.cpu() != expected.token_ids).sum())
        assert sampled.logprobs is not None
        assert expected.logprobs is not None
        apart = (sampled.logprobs.top_logprobs.cpu() - expected.logprobs.top_logprobs).abs()
        right = different <= rows // 32 and int((~(apart <= 1e-3)).sum()) <= rows // 32
        worst = float(apart.max())
        yield check(name, right and bool(sampled.row_ok.all()), different_tokens=different, largest_difference=worst)
