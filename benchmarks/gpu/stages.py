"""The stages of ``benchmarks.gpu_check``: what each checks or measures, and how long that may take.

A bare machine needs torch, triton and numpy for kernels, parity and kernel-speed, and transformers for two of the
others; what else there is to carry is in ``requirements.txt``.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.gpu.records import Record, check, guarded

_SERVICE_MODULES = (
    *("google.rpc", "grpc_health", "grpc_reflection", "grpc_status", "jinja2", "llguidance", "prometheus_client"),
    *("pydantic_settings", "pythonjsonlogger", "tokenizers", "typer", "zmq"),
)


@dataclass(frozen=True, slots=True)
class StageInputs:
    """What stages work on."""

    device: torch.device
    shapes: tuple[str, ...]  # models that are measured
    models: Path  # where their checkpoints are kept
    runs: int  # of each workload that is served


@dataclass(frozen=True, slots=True)
class Stage:
    """``seconds``: what it may take at most on a GPU, kernels that are compiled for the first time included.
    ``alone``: it measures, and nothing else may run meanwhile.
    """

    work: Callable[[StageInputs], Iterator[Record]]
    seconds: float
    alone: bool = False


def _kernels(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.kernel_checks import check_kernels

    return check_kernels(inputs.device)


def _parity(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.parity import check_parity

    return check_parity(inputs.device)


def _graphs(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.model_checks import check_graphs, check_launches

    yield from guarded("graphs = eager", check_graphs(inputs.device))
    yield from check_launches(inputs.device)


def _exact(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.model_checks import check_exact, check_exact_kernels

    yield from guarded("exact linear", check_exact_kernels(inputs.device))
    yield from check_exact(inputs.device)


def _transformers(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.model_checks import check_transformers

    return check_transformers(inputs.device)


def _cluster(inputs: StageInputs) -> Iterator[Record]:
    missing = _missing()
    if missing:
        yield check("cluster", False, error=f"needs {', '.join(missing)}")
        return
    from benchmarks.gpu.cluster_checks import check_equality

    os.environ.pop("BATON_KERNELS", None)  # a whole cluster in an interpreter would never end
    yield from check_equality(inputs.device.type)


def _determinism(inputs: StageInputs) -> Iterator[Record]:
    missing = _missing()
    if missing:
        yield check("determinism", False, error=f"needs {', '.join(missing)}")
        return
    from benchmarks.gpu.cluster_checks import check_determinism

    os.environ.pop("BATON_KERNELS", None)
    device = inputs.device.type
    for exact in (False, True) if device == "cuda" else (True,):
        yield from guarded("cluster determinism", check_determinism(device, exact), exact=exact)


def _kernel_speed(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.kernel_bench import SIZES, SMALL_SIZES, Roofline, bench_kernels, measure_roofline

    if inputs.device.type == "cuda":
        return bench_kernels(inputs.device, measure_roofline(), SIZES)
    return bench_kernels(inputs.device, Roofline(1.0, 1.0, 1.0), SMALL_SIZES)


def _decode_speed(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.engine_bench import DecodeSize, bench_decode
    from benchmarks.gpu.kernel_bench import measure_roofline

    device = inputs.device
    if device.type == "cpu":
        yield from bench_decode("qwen3-tiny", device, [DecodeSize(2, 3, 1)], exact=False, bytes_per_s=None)
        return
    bandwidth = measure_roofline().bytes_per_s
    sizes = [DecodeSize(rows, 512, 32) for rows in (1, 64, 256)]
    for shape in inputs.shapes:
        for exact in (False, True):
            found = bench_decode(shape, device, sizes, exact, bandwidth)
            yield from guarded("decode", found, shape=shape, exact=exact)


def _nano(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.engine_bench import bench_nano, nano_workload

    workload = nano_workload()
    if inputs.device.type == "cuda":  # in steps as large as nano-vllm's
        return bench_nano(inputs.shapes[0], inputs.device, workload, max_rows=256, max_tokens=16384)
    short = [([token % 4000 for token in prompt[:5]], 2) for prompt, _ in workload[:3]]
    return bench_nano("qwen3-tiny", inputs.device, short, max_rows=2, max_tokens=8)


def _profile(inputs: StageInputs) -> Iterator[Record]:
    from benchmarks.gpu.engine_bench import DecodeSize, free
    from benchmarks.gpu.step_profile import profile_steps

    device = inputs.device
    if device.type == "cpu":
        yield from profile_steps("qwen3-tiny", device, DecodeSize(2, 3, 1), prompt=4)
        return
    for shape in inputs.shapes:
        yield from guarded("profile", profile_steps(shape, device, DecodeSize(64, 512, 8), prompt=2048), shape=shape)
        free(device)


def _serving(inputs: StageInputs) -> Iterator[Record]:
    if inputs.device.type == "cpu":  # which `make bench-serve` measures
        return
    missing = _missing()
    if missing:
        yield check("serving", False, error=f"needs {', '.join(missing)}")
        return
    from benchmarks.gpu.cluster_checks import measure_serving

    yield from measure_serving(inputs.device.type, inputs.shapes[:1], inputs.models, inputs.runs)


def _missing() -> list[str]:
    return [module for module in _SERVICE_MODULES if not _is_here(module)]


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it belongs to
        return False


STAGES: Final[dict[str, Stage]] = {
    "kernels": Stage(_kernels, 150.0),
    "parity": Stage(_parity, 90.0),
    "graphs": Stage(_graphs, 120.0),
    "exact": Stage(_exact, 90.0),
    "transformers": Stage(_transformers, 90.0),
    "cluster": Stage(_cluster, 150.0),
    "determinism": Stage(_determinism, 90.0),
    "kernel-speed": Stage(_kernel_speed, 80.0, alone=True),
    "decode-speed": Stage(_decode_speed, 120.0, alone=True),
    "nano": Stage(_nano, 60.0, alone=True),
    "profile": Stage(_profile, 60.0, alone=True),
    "serving": Stage(_serving, 90.0, alone=True),
}
"""By name, in the order in which they are begun."""
