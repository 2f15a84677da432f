"""Compiles every Triton kernel for a Hopper GPU, without one: ``python -m tests.kernels.gpu_compilation``.

The interpreter accepts what the compiler does not. Kernels go through their wrappers, on CPU tensors that stand for the
device's, up to where they would be launched. Prints one JSON object: by kernel, what the compiler made of it.
"""

import json
import os

os.environ.pop("TRITON_INTERPRET", None)

from collections import defaultdict
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels.activation import gpu as activation
from kernels.kv_append import gpu as kv_append
from kernels.linear import gpu as linear
from kernels.paged_attention import gpu as attention
from kernels.paged_attention import plan_attention
from kernels.rms_norm import gpu as rms_norm
from kernels.rotary import gpu as rotary
from kernels.rotary_append import Rotation
from kernels.rotary_append import gpu as rotary_append
from kernels.sampling import gpu as sampling

from .sampling_oracle import Row, batch_of


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


made: dict[str, list[dict[str, Any]]] = defaultdict(list)
_run = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    kernel = _run(self, *args, grid=grid, warmup=True, **options)
    assembly = kernel.asm["ptx"]
    matrix = next((unit for unit in ("wgmma", "mma.sync") if unit in assembly), None)
    made[self.__name__].append({"shared": kernel.metadata.shared, "matrix_unit": matrix})


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only
    torch.empty = torch.zeros  # what kernels would have filled is read by torch operations after them
    dtype = torch.bfloat16
    x, weight = torch.zeros(5, 1024, dtype=dtype), torch.zeros(1024, dtype=dtype)
    query, key = torch.zeros(5, 16, 128, dtype=dtype), torch.zeros(5, 8, 128, dtype=dtype)
    norm, angles, ids = torch.zeros(128, dtype=dtype), torch.zeros(5, 64), torch.zeros(5, dtype=torch.int64)
    cache = torch.zeros(9, 16, 8, 128, dtype=dtype)
    activation.silu_and_mul(x)
    rms_norm.rms_norm(x, weight, 1e-6)
    rms_norm.add_rms_norm(x, x, weight, 1e-6)
    for head_norm in (norm, None):
        rotary.norm_rotary(query, head_norm, 1e-6, angles, angles)
        rotation = Rotation(angles, angles, head_norm, head_norm, 1e-6)
        rotary_append.rotary_append(query, key, key, rotation, cache, cache, ids)
    kv_append.kv_append(key, key, cache, cache, ids)
    for rows in (
        [Row()],
        [Row(temperature=1.0)],
        [Row(temperature=1.0, top_k=5)],
        [Row(1.0, 5, 0.9, 0.1, 1.1, allowed=frozenset([3]), bias={3: 1.0}, log=(3,), position=1, prompt_len=1)],
    ):
        sampling.sample(torch.zeros(1, 151_936), batch_of(rows, 151_936, num_top=2))
    for columns in (1024, 6144, 151_936):
        linear.linear(x, torch.zeros(columns, 1024, dtype=dtype), None, dtype)
    linear.linear(x, torch.zeros(1024, 1024, dtype=dtype), weight, torch.float32)
    tables = torch.zeros(2, 20, dtype=torch.int32)
    plan = plan_attention(np.array([0, 1, 5], np.int32), np.array([300, 20], np.int32), tables, 16, 2)
    for rows in (16, 64):
        for side_by_side in (False, True):
            attention.paged_attention(query, cache, cache, plan, 0.1, rows=rows, side_by_side=side_by_side)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
