"""Whole models: graphs against eager steps, the exact mode bit by bit, and transformers on the same weights."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.checkpoints.random_weights import write_random_checkpoint
from baton.checkpoints.shapes import SHAPES, CheckpointShape
from benchmarks.gpu.driver import Driver, DriverOptions, Row, random_model
from benchmarks.gpu.records import Record, check, guarded
from executor_service.memory import peak_bytes
from executor_service.step_output import StepOutput
from executor_service.step_plan import RowSampling
from executor_service.warmup import LargestStep, everything
from executor_service.weights import load_model

_FAMILIES = ("qwen3-tiny", "qwen2-tiny", "llama3-tiny")
_GRAPH_SHAPES = ("qwen3-tiny", "qwen3-0.6b", "qwen3-8b")
_TIE = 1e-3


def _prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 4000, int(size)).tolist() for size in rng.integers(2, longest + 1, count)]


def generate(driver: Driver, prompts: Sequence[list[int]], count: int, temperature: float = 0.0) -> list[list[int]]:
    """``count`` tokens for each prompt: all prefilled in one step, then decoded together.

    Raises ``RuntimeError`` for logits that are not finite: their tokens mean nothing, and would all be the same.
    """
    rows = [
        driver.admit(prompt, count, RowSampling(temperature=temperature, top_p=0.9, top_k=50, seed=number))
        for number, prompt in enumerate(prompts)
    ]
    outputs: list[list[int]] = [[] for _ in rows]
    for step in range(count):
        parts = [(row, len(row.tokens) if step == 0 else 1) for row in rows]
        sampled = driver.launch(parts).wait()
        if not sampled.row_ok.all():
            raise RuntimeError(f"logits of {(~sampled.row_ok).sum()} of {len(rows)} rows are not finite")
        for output, token in zip(outputs, sampled.token_ids.tolist(), strict=True):
            output.append(token)
    for row in rows:
        driver.release(row)
    return outputs


def cut(name: str, layers: int = 2) -> CheckpointShape:
    """A real model's shape with its first layers only: all its kernels, little work."""
    return replace(SHAPES[name], num_hidden_layers=layers)


def check_graphs(device: torch.device) -> Iterator[Record]:
    """The same tokens from captured steps as from eager ones, greedy and sampled, in batches of many sizes."""
    if device.type == "cpu":
        options = DriverOptions(device, torch.float32, max_rows=2, max_tokens=8, max_len=16, exact=True)
        yield from _compare_graphs("qwen3-tiny", SHAPES["qwen3-tiny"], options, sizes=[2], count=2, longest=4)
        return
    options = DriverOptions(device, torch.bfloat16, max_rows=64, max_tokens=2048, max_len=256, exact=True)
    for name in _GRAPH_SHAPES:
        shape = SHAPES[name] if name.endswith("-tiny") else cut(name)
        found = _compare_graphs(name, shape, options, sizes=[1, 3, 17, 64], count=24, longest=30)
        yield from guarded("graphs = eager", found, shape=name)


def _compare_graphs(
    name: str, shape: CheckpointShape, options: DriverOptions, sizes: list[int], count: int, longest: int
) -> Iterator[Record]:
    eager, graphed = (Driver(random_model(shape, options.device, options.dtype), options) for _ in range(2))
    use = graphed.capture().use
    for size in sizes:
        for temperature in (0.0, 1.0):
            prompts = _prompts(size, longest, seed=size)
            expected = generate(eager, prompts, count, temperature)
            before = use.replayed
            same = sum(a == b for a, b in zip(generate(graphed, prompts, count, temperature), expected, strict=True))
            replayed = use.replayed - before
            details = {"shape": name, "rows": size, "temperature": temperature, "same": same, "replayed": replayed}
            yield check("graphs = eager", same == size and replayed > 0, **details)


def check_launches(device: torch.device) -> Iterator[Record]:
    """No launch of a step waits for the device: torch raises where one would. Then the largest steps' memory."""
    if device.type == "cpu":
        return
    options = DriverOptions(device, torch.bfloat16, max_rows=64, max_tokens=2048, max_len=2048)
    driver = Driver(random_model(SHAPES["qwen3-tiny"], device, torch.bfloat16), options)
    for graphs in (False, True):
        if graphs:
            driver.capture()
        for name, sampling in (
            ("greedy", RowSampling()),
            ("filtered", RowSampling(temperature=1.0, top_k=50, top_p=0.9)),
            ("everything", everything(driver.limits)),
        ):
            details: Record = {"sampling": name, "graphs": graphs}
            yield from guarded("launches do not wait", _launch_without_waiting(driver, sampling, details), **details)
    step = LargestStep(driver.limits, options.block_size)
    driver.launcher.reset()
    yield {"bench": "largest step", "mib": peak_bytes(device, lambda: step.run(driver.launcher)) / (1 << 20)}


def _launch_without_waiting(driver: Driver, sampling: RowSampling, details: Record) -> Iterator[Record]:
    for mode in ("default", "error"):  # the first time kernels are compiled
        rows = [driver.admit(prompt, 4, sampling) for prompt in _prompts(20, 60)]
        outputs: list[StepOutput] = []
        torch.cuda.set_sync_debug_mode(mode)
        try:
            outputs.append(driver.launch([(row, len(row.tokens)) for row in rows]))
            outputs += [driver.launch([(row, 1) for row in rows]) for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for row in rows:
                driver.release(row)
        ok = all(output.wait().row_ok.all() for output in outputs)
    yield check("launches do not wait", ok, **details)


def check_exact(device: torch.device) -> Iterator[Record]:
    """Logits of a prompt, bit by bit: alone, in chunks, beside others, as decodes."""
    if device.type == "cpu":
        options = DriverOptions(device, torch.float32, max_rows=4, max_tokens=8192, max_len=400, exact=True)
        yield from _compare_company("qwen3-tiny", SHAPES["qwen3-tiny"], options, length=7, mates=1)
        return
    options = DriverOptions(device, torch.bfloat16, max_rows=64, max_tokens=8192, max_len=400, exact=True)
    for name, shape in (("qwen3-small", SHAPES["qwen3-small"]), ("qwen3-8b", cut("qwen3-8b"))):
        yield from guarded("exact", _compare_company(name, shape, options, length=300, mates=60), shape=name)


def _compare_company(
    name: str, shape: CheckpointShape, options: DriverOptions, length: int, mates: int
) -> Iterator[Record]:
    driver = Driver(random_model(shape, options.device, options.dtype), options)
    prompt = np.random.default_rng(9).integers(3, 4000, length).tolist()

    def run(chunks: Sequence[int], others: int) -> list[torch.Tensor]:
        row, company = driver.admit(prompt), [driver.admit(one) for one in _prompts(others, length, seed=others)]
        results = []
        for size in chunks:
            parts: list[tuple[Row, int]] = [(row, size)]
            for number, other in enumerate(company):
                left = len(other.tokens) - other.computed
                if left:
                    parts.insert(number % 2 * len(parts), (other, 1 if number % 3 else min(left, 40)))
            logits = driver.logits(parts)
            results.append(logits[[one for one, _ in parts].index(row)])
        for one in (row, *company):
            driver.release(one)
        return results

    whole = run([length], 0)[-1]
    pieces = [length // 3, 1, length - length // 3 - 2, 1]
    for case, chunks, others in (
        ("in chunks", pieces, 0),
        ("beside others", [length], mates),
        ("in chunks beside others", pieces, mates),
        ("decoding at the end", [length - 1, 1], mates // 2),
    ):
        logits = run(chunks, others)[-1]
        distance = _distance(logits, whole)
        same = torch.equal(logits, whole) and bool(whole.any())
        yield check("exact", same, shape=name, case=case, largest_difference=distance)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def check_exact_kernels(device: torch.device) -> Iterator[Record]:
    """Rows of the invariant linear at the shapes of 0.6B and 8B models, for many numbers of rows."""
    from benchmarks.gpu.cases import random
    from kernels.linear import gpu

    counts: tuple[int, ...]
    if device.type == "cpu":
        shapes, counts, dtype = [(70, 50)], (1, 2, 17), torch.float32
    else:
        shapes, dtype = [(4096, 1024), (1024, 3072), (6144, 4096), (24576, 4096), (4096, 12288)], torch.bfloat16
        counts = (1, 2, 3, 16, 17, 63, 64, 65, 128, 255, 1000)
    for n, k in shapes:
        x, weight = random((max(counts), k), device, dtype, 0), random((n, k), device, dtype, 1)
        expected = gpu.linear(x, weight, None, torch.float32)
        different = [
            m for m in counts if not torch.equal(gpu.linear(x[-m:], weight, None, torch.float32), expected[-m:])
        ]
        yield check("exact linear", not different, n=n, k=k, row_counts=len(counts), different=different)


def check_transformers(device: torch.device) -> Iterator[Record]:
    """Greedy tokens of every family against transformers on the same checkpoint and device, float32."""
    torch.set_float32_matmul_precision("highest")
    modes = (False, True) if device.type == "cuda" else (False,)
    for family in _FAMILIES if device.type == "cuda" else _FAMILIES[:1]:
        yield from guarded("transformers", _compare_transformers(family, device, modes), family=family)


def _compare_transformers(family: str, device: torch.device, modes: Sequence[bool]) -> Iterator[Record]:
    import transformers

    rows, longest, count = (32, 200, 32) if device.type == "cuda" else (2, 6, 2)
    prompts = _prompts(rows, longest)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / family
        write_random_checkpoint(SHAPES[family], checkpoint, dtype="float32")
        reference: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        reference.to(device)
        models = {exact: load_model(checkpoint, device, torch.float32) for exact in modes}
    for exact, model in models.items():
        driver = Driver(model, DriverOptions(device, torch.float32, rows, 8192, longest + count, exact=exact))
        if device.type == "cuda":
            driver.capture()
        worst = 0.0
        for prompt, output in zip(prompts, generate(driver, prompts, count), strict=True):
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt + output], device=device)).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(output, device=device).unsqueeze(1)).squeeze(1)
            worst = max(worst, float((logits.max(-1).values - chosen).max()))
        details = {"family": family, "exact": exact, "requests": rows, "tokens": count, "largest_gap": worst}
        yield check("transformers", worst < _TIE, **details)
