"""Whole models: graphs against eager steps, the exact mode bit by bit, and transformers on the same weights."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.checkpoints.random_weights import SHAPES, write_random_checkpoint
from benchmarks.gpu.driver import Driver, DriverOptions, Row, random_model
from benchmarks.gpu.records import Record, check
from executor_service.memory import peak_bytes
from executor_service.step_output import StepOutput
from executor_service.step_plan import RowSampling
from executor_service.warmup import LargestStep, everything
from executor_service.weights import load_model

_FAMILIES = ("qwen3-tiny", "qwen2-tiny", "llama3-tiny")
_TIE = 1e-3


def _prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 4000, int(size)).tolist() for size in rng.integers(2, longest + 1, count)]


def generate(driver: Driver, prompts: Sequence[list[int]], count: int, temperature: float = 0.0) -> list[list[int]]:
    """``count`` tokens for each prompt: all prefilled in one step, then decoded together."""
    rows = [
        driver.admit(prompt, count, RowSampling(temperature=temperature, top_p=0.9, top_k=50, seed=number))
        for number, prompt in enumerate(prompts)
    ]
    outputs: list[list[int]] = [[] for _ in rows]
    for step in range(count):
        parts = [(row, len(row.tokens) if step == 0 else 1) for row in rows]
        for output, token in zip(outputs, driver.launch(parts).wait().token_ids.tolist(), strict=True):
            output.append(token)
    for row in rows:
        driver.release(row)
    return outputs


def check_graphs(device: torch.device) -> Iterator[Record]:
    """The same tokens from captured steps as from eager ones, greedy and sampled, in batches of many sizes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = [1, 3, 17, 64] if device.type == "cuda" else [2]
    options = DriverOptions(device, dtype, max_rows=64, max_tokens=2048, max_len=256, exact=True)
    if device.type == "cpu":
        options = DriverOptions(device, dtype, max_rows=2, max_tokens=8, max_len=16, exact=True)
    count, longest = (24, 30) if device.type == "cuda" else (2, 4)
    eager, graphed = (Driver(random_model(SHAPES["qwen3-tiny"], device, dtype), options) for _ in range(2))
    graphed.capture()
    for size in sizes:
        for temperature in (0.0, 1.0):
            prompts = _prompts(size, longest, seed=size)
            expected = generate(eager, prompts, count, temperature)
            same = sum(a == b for a, b in zip(generate(graphed, prompts, count, temperature), expected, strict=True))
            yield check("graphs = eager", same == size, rows=size, temperature=temperature, same=same)


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
            for mode in ("default", "error"):  # the first time kernels are compiled
                rows = [driver.admit(prompt, 4, sampling) for prompt in _prompts(20, 60)]
                outputs: list[StepOutput] = []
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    outputs.append(driver.launch([(row, len(row.tokens)) for row in rows]))
                    outputs += [driver.launch([(row, 1) for row in rows]) for _ in range(2)]
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                ok = all(output.wait().row_ok.all() for output in outputs)
                for row in rows:
                    driver.release(row)
            yield check("launches do not wait", bool(ok), sampling=name, graphs=graphs)
    step = LargestStep(driver.limits, options.block_size)
    driver.launcher.reset()
    yield {"bench": "largest step", "mib": peak_bytes(device, lambda: step.run(driver.launcher)) / (1 << 20)}


def check_exact(device: torch.device) -> Iterator[Record]:
    """Logits of a prompt, bit by bit: alone, in chunks, beside others, as decodes; and tokens through graphs."""
    shape, dtype = ("qwen3-small", torch.bfloat16) if device.type == "cuda" else ("qwen3-tiny", torch.float32)
    length, mates = (300, 60) if device.type == "cuda" else (7, 1)
    options = DriverOptions(
        device, dtype, max_rows=64 if device.type == "cuda" else 4, max_tokens=8192, max_len=400, exact=True
    )
    driver = Driver(random_model(SHAPES[shape], device, dtype), options)
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
    for name, chunks, others in (
        ("in chunks", pieces, 0),
        ("beside others", [length], mates),
        ("in chunks beside others", pieces, mates),
        ("decoding at the end", [length - 1, 1], mates // 2),
    ):
        logits = run(chunks, others)[-1]
        yield check("exact", torch.equal(logits, whole), case=name, largest_difference=_distance(logits, whole))


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
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = False
    rows, longest, count = (32, 200, 32) if device.type == "cuda" else (2, 6, 2)
    for family in _FAMILIES if device.type == "cuda" else _FAMILIES[:1]:
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = Path(directory) / family
            write_random_checkpoint(SHAPES[family], checkpoint, dtype="float32")
            reference: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            reference.to(device)
            model = load_model(checkpoint, device, torch.float32)
        options = DriverOptions(device, torch.float32, max_rows=rows, max_tokens=8192, max_len=longest + count)
        prompts = _prompts(rows, longest)
        worst = 0.0
        for prompt, output in zip(prompts, generate(Driver(model, options), prompts, count), strict=True):
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt + output], device=device)).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(output, device=device).unsqueeze(1)).squeeze(1)
            worst = max(worst, float((logits.max(-1).values - chosen).max()))
        yield check("transformers", worst < _TIE, family=family, requests=rows, tokens=count, largest_gap=worst)
