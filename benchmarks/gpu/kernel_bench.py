"""Speed of each kernel against what the same device does at most in the same run, and against torch and flash-attn."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu.cases import AttentionCase, AttentionShape, attention_case, random, sampling_batch
from benchmarks.gpu.records import Record

_MODELS = {"0.6b": AttentionShape(16, 8, 128), "8b": AttentionShape(32, 8, 128)}
_HIDDEN = {"0.6b": (1024, 3072), "8b": (4096, 12288)}


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the device did at most in this run."""

    bytes_per_s: float  # read plus written
    flops: float  # bfloat16, through torch


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median time of ``work`` on the device, with a cache that other data has passed through before each run."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        work()
    event = partial(torch.cuda.Event, enable_timing=True)
    pairs = [(event(), event()) for _ in range(repeats)]
    for began, ended in pairs:
        flush.zero_()
        began.record()
        work()
        ended.record()
    torch.cuda.synchronize()
    milliseconds: float = statistics.median(began.elapsed_time(ended) for began, ended in pairs)
    return milliseconds / 1e3


def measure_roofline() -> Roofline:
    """Copy bandwidth over 4 GiB, and a large matrix product on random data."""
    source = torch.randint(-100, 100, (4 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source), 10)
    size = 8192
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    return Roofline(copied, 2 * size**3 / seconds(lambda: a @ b, 10))


def bench_kernels(roofline: Roofline) -> Iterator[Record]:
    """One record per kernel and size: time, and the share of the roofline that bounds it."""
    yield {"bench": "roofline", "tb_per_s": roofline.bytes_per_s / 1e12, "tflops": roofline.flops / 1e12}
    device, dtype = torch.device("cuda"), torch.bfloat16
    for name, shape in _MODELS.items():
        for rows, context in ((1, 1024), (1, 16384), (64, 2048), (256, 1024)):
            yield _decode(name, attention_case([(context, 1)] * rows, shape, device, dtype), rows, context, roofline)
        for tokens in (2048, 8192):
            yield _prefill(name, attention_case([(tokens, tokens)], shape, device, dtype), tokens, roofline)
        yield from _elementwise(name, shape, roofline)
        yield from _linear(name, roofline)
    yield from _sampling(roofline)


def _decode(model: str, case: AttentionCase, rows: int, context: int, roofline: Roofline) -> Record:
    from kernels.paged_attention import gpu

    arguments = (case.query, case.key_cache, case.value_cache, case.plan, case.scale)
    moved = 2 * rows * context * case.key_cache.shape[2] * case.key_cache.shape[3] * 2
    keys, values = (_gathered(case, cache, rows, context) for cache in (case.key_cache, case.value_cache))
    query = case.query.unsqueeze(2)
    own = seconds(lambda: gpu.paged_attention(*arguments))
    record: Record = {
        "bench": "decode attention",
        "model": model,
        "rows": rows,
        "context": context,
        "us": own * 1e6,
        "exact_us": seconds(lambda: gpu.paged_attention(*arguments, exact=True)) * 1e6,
        "share_of_bandwidth": moved / own / roofline.bytes_per_s,
        # torch's reads keys that lie in order, which is easier
        "torch_us": seconds(lambda: functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True))
        * 1e6,
    }
    return {**record, **_flash(case)}


def _prefill(model: str, case: AttentionCase, tokens: int, roofline: Roofline) -> Record:
    from kernels.paged_attention import gpu

    arguments = (case.query, case.key_cache, case.value_cache, case.plan, case.scale)
    heads, dim = case.query.shape[1:]
    flops = 2 * tokens * tokens * heads * dim  # half of the scores are masked
    keys, values = (_gathered(case, cache, 1, tokens) for cache in (case.key_cache, case.value_cache))
    query = case.query.transpose(0, 1).unsqueeze(0)
    own = seconds(lambda: gpu.paged_attention(*arguments))
    record: Record = {
        "bench": "prefill attention",
        "model": model,
        "tokens": tokens,
        "us": own * 1e6,
        "share_of_flops": flops / own / roofline.flops,
        "torch_us": seconds(
            lambda: functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        )
        * 1e6,
    }
    return {**record, **_flash(case)}


def _gathered(case: AttentionCase, cache: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """[rows, kv_heads, length, head_dim], adjacent."""
    picked = cache[case.plan.block_tables.long()].flatten(1, 2)[:, :length]
    return picked.view(rows, length, *cache.shape[2:]).transpose(1, 2).contiguous()


def _flash(case: AttentionCase) -> Record:
    """flash-attn's time on the same requests, in blocks that it can read."""
    from kernels.paged_attention import flash

    if flash.installed() is None:
        return {}
    heads, dim = case.query.shape[1:]
    shape = AttentionShape(heads, case.key_cache.shape[2], dim, max(flash.block_multiple(), 16))
    starts = case.plan.query_start_loc
    lengths = list(zip(case.plan.seq_lens.tolist(), (starts[1:] - starts[:-1]).tolist(), strict=True))
    other = attention_case(lengths, shape, case.query.device, case.query.dtype)
    arguments = (other.query, other.key_cache, other.value_cache, other.plan, other.scale)
    return {"flash_us": seconds(lambda: flash.paged_attention(*arguments)) * 1e6}


def _elementwise(model: str, shape: AttentionShape, roofline: Roofline) -> Iterator[Record]:
    from kernels.activation import gpu as activation
    from kernels.kv_append import gpu as append
    from kernels.rms_norm import gpu as norm
    from kernels.rotary_append import Rotation
    from kernels.rotary_append import gpu as rotary_append

    device, dtype = torch.device("cuda"), torch.bfloat16
    hidden, inner = _HIDDEN[model]
    for tokens in (64, 8192):
        x, residual = random((tokens, hidden), device, dtype, 0), random((tokens, hidden), device, dtype, 1)
        weight = random((hidden,), device, dtype, 2)
        gate_up = random((tokens, 2 * inner), device, dtype, 3)
        heads = shape.heads + 2 * shape.kv_heads
        fused = random((tokens, heads, shape.head_dim), device, dtype, 4)
        query, key, value = torch.split(fused, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        angles = random((tokens, shape.head_dim // 2), device, torch.float32, 5)
        rotation = Rotation(angles.cos(), angles.sin(), weight[: shape.head_dim], weight[: shape.head_dim], 1e-6)
        cache = torch.zeros((2, tokens, 1, shape.kv_heads, shape.head_dim), device=device, dtype=dtype)
        slots = torch.randperm(tokens, device=device)
        works: dict[str, tuple[Callable[[], object], int]] = {
            "add_rms_norm": (lambda: norm.add_rms_norm(x, residual, weight, 1e-6), 4 * x.nbytes),  # noqa: B023
            "silu_and_mul": (lambda: activation.silu_and_mul(gate_up), gate_up.nbytes * 3 // 2),  # noqa: B023
            "kv_append": (
                lambda: append.kv_append(key, value, cache[0], cache[1], slots),  # noqa: B023
                4 * key.numel() * 2,
            ),
            "rotary_append": (
                lambda: rotary_append.rotary_append(query, key, value, rotation, cache[0], cache[1], slots),  # noqa: B023
                2 * fused.nbytes,
            ),
        }
        for name, (work, moved) in works.items():
            time = seconds(work)
            share = moved / time / roofline.bytes_per_s
            yield {"bench": name, "model": model, "tokens": tokens, "us": time * 1e6, "share_of_bandwidth": share}


def _linear(model: str, roofline: Roofline) -> Iterator[Record]:
    from kernels.linear import gpu

    device, dtype = torch.device("cuda"), torch.bfloat16
    hidden, inner = _HIDDEN[model]
    for n, k in ((2 * inner, hidden), (hidden, inner)):
        weight = random((n, k), device, dtype, 0)
        for m in (1, 64, 4096):
            x = random((m, k), device, dtype, 1)
            own = seconds(lambda: gpu.linear(x, weight, None, dtype))  # noqa: B023
            library = seconds(lambda: functional.linear(x, weight))  # noqa: B023
            floor = max((weight.nbytes + x.nbytes + 2 * m * n) / roofline.bytes_per_s, 2 * m * n * k / roofline.flops)
            yield {
                "bench": "exact linear",
                "model": model,
                "shape": f"{m}x{n}x{k}",
                "us": own * 1e6,
                "share_of_roofline": floor / own,
                "cublas_us": library * 1e6,
                "cublas_share": floor / library,
            }


def _sampling(roofline: Roofline) -> Iterator[Record]:
    """A sampler must read every logit once."""
    from kernels.sampling import composed, gpu

    device = torch.device("cuda")
    for rows in (1, 64, 256):
        logits = torch.randn((rows, 151_936), device=device) * 3
        plain, filtered = (sampling_batch(rows, device, filtered=filters) for filters in (False, True))
        greedy = replace(plain, temperature=torch.zeros_like(plain.temperature), all_greedy=True)
        drawn = seconds(lambda: gpu.sample(logits, plain))  # noqa: B023
        yield {
            "bench": "sampling",
            "rows": rows,
            "greedy_us": seconds(lambda: gpu.sample(logits, greedy)) * 1e6,  # noqa: B023
            "drawn_us": drawn * 1e6,
            "drawn_share_of_bandwidth": logits.nbytes / drawn / roofline.bytes_per_s,
            "filtered_us": seconds(lambda: gpu.sample(logits, filtered)) * 1e6,  # noqa: B023
            "composed_us": seconds(lambda: composed.sample(logits, plain)) * 1e6,  # noqa: B023
            "composed_filtered_us": seconds(lambda: composed.sample(logits, filtered)) * 1e6,  # noqa: B023
        }
