"""Speed of each kernel against what the same device does at most in the same run, and against torch and flash-attn."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.cases import AttentionCase, AttentionShape, attention_case, random, sampling_batch
from benchmarks.gpu.records import Record, guarded

_FLUSH_ELEMENTS = 1 << 29


@dataclass(frozen=True, slots=True)
class Model:
    """What kernels must know of a model."""

    name: str
    attention: AttentionShape
    hidden: int
    inner: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What kernels are measured on."""

    models: tuple[Model, ...]
    decodes: tuple[tuple[int, int], ...]  # rows, keys of each
    prompts: tuple[int, ...]
    tokens: tuple[int, ...]  # of elementwise kernels
    products: tuple[int, ...]  # rows of matrix products
    samples: tuple[int, ...]
    vocab_size: int


# What elementwise kernels move in the larger size is several times the largest L2 cache of today.
SIZES = Sizes(
    models=(
        Model("0.6b", AttentionShape(16, 8, 128), 1024, 3072),
        Model("8b", AttentionShape(32, 8, 128), 4096, 12288),
    ),
    decodes=((1, 1024), (1, 16384), (64, 2048), (256, 1024)),
    prompts=(2048, 8192),
    tokens=(64, 32768),
    products=(1, 64, 4096),
    samples=(1, 64, 256),
    vocab_size=151_936,
)
SMALL_SIZES = Sizes((Model("tiny", AttentionShape(4, 2, 20), 70, 50),), ((2, 20),), (9,), (3,), (2,), (2,), 500)


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the device did at most in this run."""

    bytes_per_s: float  # the faster of a copy, read plus written, and of reading alone
    copied_per_s: float
    flops: float  # bfloat16, through torch


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median time of ``work`` on the device, with a cache that other data has passed through before each run.

    That data is read, 2 GiB of it: written, it would have to leave the cache while ``work`` is timed. It also takes
    the device longer than the host needs to launch ``work``, whose kernels wait in line then: up to some 80
    launches are not timed.
    Without a device it is what the interpreter takes, once.
    """
    if not torch.cuda.is_available():
        before = time.perf_counter()
        work()
        return time.perf_counter() - before
    flush = _flush()
    for _ in range(3):
        work()
    event = partial(torch.cuda.Event, enable_timing=True)
    pairs = [(event(), event()) for _ in range(repeats)]
    for began, ended in pairs:
        torch.sum(flush)
        began.record()
        work()
        ended.record()
    torch.cuda.synchronize()
    milliseconds: float = statistics.median(began.elapsed_time(ended) for began, ended in pairs)
    return milliseconds / 1e3


@cache
def _flush() -> Tensor:
    return torch.zeros(_FLUSH_ELEMENTS, dtype=torch.float32, device="cuda")


def measure_roofline() -> Roofline:
    """Copying and reading 4 GiB, and a large matrix product on random data."""
    source = torch.randn(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), 10)
    read = source.nbytes / seconds(lambda: torch.sum(source), 10)
    size = 8192
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    return Roofline(max(copied, read), copied, 2 * size**3 / seconds(lambda: a @ b, 10))


def bench_kernels(device: torch.device, roofline: Roofline, sizes: Sizes) -> Iterator[Record]:
    """One record per kernel and size: time, and the share of the roofline that bounds it."""
    yield {
        "bench": "roofline",
        "tb_per_s": roofline.bytes_per_s / 1e12,
        "copy_tb_per_s": roofline.copied_per_s / 1e12,
        "tflops": roofline.flops / 1e12,
    }
    for model in sizes.models:
        for rows, context in sizes.decodes:
            found = _decode(model, device, rows, context, roofline)
            yield from guarded("decode attention", found, model=model.name, rows=rows)
        for tokens in sizes.prompts:
            found = _prefill(model, device, tokens, roofline)
            yield from guarded("prefill attention", found, model=model.name, tokens=tokens)
        for tokens in sizes.tokens:
            found = _elementwise(model, device, tokens, roofline)
            yield from guarded("elementwise", found, model=model.name, tokens=tokens)
        for columns, depth in ((2 * model.inner, model.hidden), (model.hidden, model.inner)):
            found = _linear(model, device, columns, depth, sizes.products, roofline)
            yield from guarded("exact linear", found, model=model.name)
    for rows in sizes.samples:
        yield from guarded("sampling", _sampling(device, rows, sizes.vocab_size, roofline), rows=rows)


def _decode(model: Model, device: torch.device, rows: int, context: int, roofline: Roofline) -> Iterator[Record]:
    from kernels.paged_attention import gpu

    shape = model.attention
    case = attention_case([(context, 1)] * rows, shape, device, _dtype(device))
    attend = partial(gpu.paged_attention, case.query, case.key_cache, case.value_cache, case.plan, case.scale)
    moved = 2 * rows * context * shape.kv_heads * shape.head_dim * 2
    keys, values = (_gathered(case, cache, rows, context) for cache in (case.key_cache, case.value_cache))
    query = case.query.unsqueeze(2)
    own = seconds(attend)
    # torch's reads keys that lie in order, which is easier
    library = seconds(partial(functional.scaled_dot_product_attention, query, keys, values, enable_gqa=True))
    yield {
        "bench": "decode attention",
        "model": model.name,
        "rows": rows,
        "context": context,
        "us": own * 1e6,
        "share_of_bandwidth": moved / own / roofline.bytes_per_s,
        "exact_us": seconds(partial(attend, exact=True)) * 1e6,
        "torch_us": library * 1e6,
        "flash_us": _flash_us(case),
    }


def _prefill(model: Model, device: torch.device, tokens: int, roofline: Roofline) -> Iterator[Record]:
    from kernels.paged_attention import gpu

    shape = model.attention
    case = attention_case([(tokens, tokens)], shape, device, _dtype(device))
    attend = partial(gpu.paged_attention, case.query, case.key_cache, case.value_cache, case.plan, case.scale)
    flops = 2 * tokens * tokens * shape.heads * shape.head_dim  # half of the scores are masked
    keys, values = (_gathered(case, cache, 1, tokens) for cache in (case.key_cache, case.value_cache))
    query = case.query.transpose(0, 1).unsqueeze(0)
    own = seconds(attend)
    library = seconds(
        partial(functional.scaled_dot_product_attention, query, keys, values, is_causal=True, enable_gqa=True)
    )
    yield {
        "bench": "prefill attention",
        "model": model.name,
        "tokens": tokens,
        "us": own * 1e6,
        "share_of_flops": flops / own / roofline.flops,
        "exact_us": seconds(partial(attend, exact=True)) * 1e6,
        "torch_us": library * 1e6,
        "flash_us": _flash_us(case),
    }


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16


def _gathered(case: AttentionCase, cache: Tensor, rows: int, length: int) -> Tensor:
    """[rows, kv_heads, length, head_dim], adjacent."""
    picked = cache[case.plan.block_tables.long()].flatten(1, 2)[:, :length]
    return picked.view(rows, length, *cache.shape[2:]).transpose(1, 2).contiguous()


def _flash_us(case: AttentionCase) -> float | None:
    """flash-attn's time on the same requests, in blocks that it can read; None where it is not installed."""
    from kernels.paged_attention import flash

    if flash.installed() is None:
        return None
    heads, dim = case.query.shape[1:]
    shape = AttentionShape(heads, case.key_cache.shape[2], dim, max(flash.block_multiple(), 16))
    starts = case.plan.query_start_loc
    lengths = list(zip(case.plan.seq_lens.tolist(), (starts[1:] - starts[:-1]).tolist(), strict=True))
    other = attention_case(lengths, shape, case.query.device, case.query.dtype)
    attend = partial(flash.paged_attention, other.query, other.key_cache, other.value_cache, other.plan, other.scale)
    return seconds(attend) * 1e6


def _elementwise(model: Model, device: torch.device, tokens: int, roofline: Roofline) -> Iterator[Record]:
    from kernels.activation import gpu as activation
    from kernels.kv_append import gpu as append
    from kernels.rms_norm import gpu as norm
    from kernels.rotary_append import Rotation
    from kernels.rotary_append import gpu as rotary_append

    dtype, shape = _dtype(device), model.attention
    x, residual = random((tokens, model.hidden), device, dtype, 0), random((tokens, model.hidden), device, dtype, 1)
    weight = random((model.hidden,), device, dtype, 2)
    gate_up = random((tokens, 2 * model.inner), device, dtype, 3)
    heads = shape.heads + 2 * shape.kv_heads
    fused = random((tokens, heads, shape.head_dim), device, dtype, 4)
    query, key, value = torch.split(fused, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    angles = random((tokens, shape.head_dim // 2), device, torch.float32, 5)
    rotation = Rotation(angles.cos(), angles.sin(), weight[: shape.head_dim], weight[: shape.head_dim], 1e-6)
    keys, values = torch.zeros((2, tokens, 1, shape.kv_heads, shape.head_dim), device=device, dtype=dtype)
    slots = torch.randperm(tokens, device=device)
    rotate = partial(rotary_append.rotary_append, query, key, value, rotation, keys, values, slots)
    works: dict[str, tuple[Callable[[], object], int]] = {  # with the bytes that each must move
        "add_rms_norm": (partial(norm.add_rms_norm, x, residual, weight, 1e-6), 4 * x.nbytes),
        "silu_and_mul": (partial(activation.silu_and_mul, gate_up), gate_up.nbytes * 3 // 2),
        "kv_append": (partial(append.kv_append, key, value, keys, values, slots), 2 * (keys.nbytes + values.nbytes)),
        "rotary_append": (rotate, 2 * fused.nbytes + 2 * angles.nbytes),
    }
    for name, (work, moved) in works.items():
        taken = seconds(work)
        figures = {"us": taken * 1e6, "share_of_bandwidth": moved / taken / roofline.bytes_per_s}
        yield {"bench": "elementwise", "kernel": name, "model": model.name, "tokens": tokens, **figures}


def _linear(
    model: Model, device: torch.device, columns: int, depth: int, products: tuple[int, ...], roofline: Roofline
) -> Iterator[Record]:
    from kernels.linear import gpu

    dtype = _dtype(device)
    weight = random((columns, depth), device, dtype, 0)
    for rows in products:
        x = random((rows, depth), device, dtype, 1)
        own = seconds(partial(gpu.linear, x, weight, None, dtype))
        library = seconds(partial(functional.linear, x, weight))
        moved = weight.nbytes + x.nbytes + rows * columns * dtype.itemsize
        floor = max(moved / roofline.bytes_per_s, 2 * rows * columns * depth / roofline.flops)
        yield {
            "bench": "exact linear",
            "model": model.name,
            "shape": f"{rows}x{columns}x{depth}",
            "us": own * 1e6,
            "share_of_roofline": floor / own,
            "torch_us": library * 1e6,
            "torch_share": floor / library,
        }


def _sampling(device: torch.device, rows: int, vocab_size: int, roofline: Roofline) -> Iterator[Record]:
    """A sampler must read every logit once."""
    from kernels.sampling import composed, gpu

    logits = torch.randn((rows, vocab_size), device=device) * 3
    plain, filtered = (sampling_batch(rows, device, filtered=filters) for filters in (False, True))
    greedy = replace(plain, temperature=torch.zeros_like(plain.temperature), all_greedy=True)
    drawn = seconds(partial(gpu.sample, logits, plain))
    yield {
        "bench": "sampling",
        "rows": rows,
        "greedy_us": seconds(partial(gpu.sample, logits, greedy)) * 1e6,
        "drawn_us": drawn * 1e6,
        "drawn_share_of_bandwidth": logits.nbytes / drawn / roofline.bytes_per_s,
        "filtered_us": seconds(partial(gpu.sample, logits, filtered)) * 1e6,
        "torch_us": seconds(partial(composed.sample, logits, plain)) * 1e6,
        "torch_filtered_us": seconds(partial(composed.sample, logits, filtered)) * 1e6,
    }
