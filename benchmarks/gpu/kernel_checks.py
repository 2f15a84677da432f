"""Every Triton kernel against float64 references on random inputs; the interpreter stands in for the GPU on a CPU."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.cases import AttentionShape, attention_case, attention_in_float64, random, sampling_batch
from benchmarks.gpu.records import Record, check, relative_error

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
            ("linear", _linear_errors(device, dtype)),
            ("rms_norm", _norm_errors(device, dtype)),
            ("rotary_append", _rotary_errors(device, dtype)),
            ("silu_and_mul", _activation_errors(device, dtype)),
        ):
            worst = max(errors)
            yield check(name, worst < _LIMITS[dtype], dtype=str(dtype).removeprefix("torch."), error=worst)
    yield from _check_sampling(device)


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
    for name, filtered in (("sample", False), ("sample filtered", True)):
        expected = composed.sample(logits, sampling_batch(rows, torch.device("cpu"), filtered=filtered, num_top=1))
        sampled = gpu.sample(logits.to(device), sampling_batch(rows, device, filtered=filtered, num_top=1))
        different = int((sampled.token_ids.cpu() != expected.token_ids).sum())
        assert sampled.logprobs is not None
        assert expected.logprobs is not None
        apart = (sampled.logprobs.top_logprobs.cpu() - expected.logprobs.top_logprobs).abs()
        right = different <= rows // 32 and int((apart > 1e-3).sum()) <= rows // 32
        worst = float(apart.max())
        yield check(name, right and bool(sampled.row_ok.all()), different_tokens=different, largest_difference=worst)
