"""The compiled kernels against the same kernels in Triton's interpreter: what the compiler made of them is right.

``python -m benchmarks.gpu.parity FILE`` writes the interpreter's outputs; needs ``TRITON_INTERPRET=1``.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.cases import AttentionShape, attention_case, random, sampling_batch
from benchmarks.gpu.records import Record, check, relative_error

_LIMIT = 1e-3
_BY_BIT = {"tokens", "append"}


def outputs(device: torch.device) -> dict[str, NDArray[np.float32]]:
    """Every kernel's output on small inputs, in float16 and float32."""
    from kernels.activation import gpu as activation
    from kernels.kv_append import gpu as append
    from kernels.linear import gpu as linear
    from kernels.paged_attention import gpu as attention
    from kernels.rms_norm import gpu as norm
    from kernels.rotary import gpu as rotary
    from kernels.sampling import gpu as sampling

    results: dict[str, torch.Tensor] = {}
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        case = attention_case([(300, 5), (70, 1), (9, 9)], AttentionShape(6, 2, 20, 16), device, dtype, padding=2)
        for side_by_side in (False, True):
            results[f"attention.{side_by_side}.{name}"] = attention.paged_attention(
                case.query, case.key_cache, case.value_cache, case.plan, case.scale, side_by_side=side_by_side
            )
        x, weight = random((20, 70), device, dtype, 0), random((50, 70), device, dtype, 1)
        results[f"linear.{name}"] = linear.linear(x, weight, None, torch.float32)
        results[f"norm.{name}"] = norm.rms_norm(x, weight[0].contiguous(), 1e-6)
        results[f"activation.{name}"] = activation.silu_and_mul(x)
        heads, angles = random((4, 3, 20), device, dtype, 2), random((4, 10), device, torch.float32, 3)
        results[f"rotary.{name}"] = rotary.norm_rotary(heads, None, 0.0, angles.cos(), angles.sin())
        cache = torch.zeros((2, 3, 4, 3, 20), device=device, dtype=dtype)
        append.kv_append(heads, heads, cache[0], cache[1], torch.tensor([7, 2, 11, 0], device=device))
        results[f"append.{name}"] = cache
    logits = random((3, 3000), device, torch.float32, 4, scale=3.0)
    for filtered in (False, True):
        sampled = sampling.sample(logits, sampling_batch(3, device, filtered=filtered, num_top=2), chunk=1024)
        assert sampled.logprobs is not None
        results[f"tokens.{filtered}"] = sampled.token_ids
        results[f"logprobs.{filtered}"] = sampled.logprobs.logprobs
    return {name: output.float().cpu().numpy() for name, output in results.items()}


def check_parity(device: torch.device) -> Iterator[Record]:
    """Compare both; on a CPU there is nothing to compare."""
    if device.type == "cpu":
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "interpreted.npz"
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "benchmarks.gpu.parity", str(path)]
        subprocess.run(command, env=environment, check=True, timeout=240)
        with np.load(path) as interpreted:
            for name, output in outputs(device).items():
                expected = interpreted[name]
                if name.partition(".")[0] in _BY_BIT:
                    yield check("parity", np.array_equal(output, expected), kernel=name, by_bit=True)
                else:
                    error = relative_error(torch.from_numpy(output), torch.from_numpy(expected))
                    yield check("parity", error < _LIMIT, kernel=name, error=error)


if __name__ == "__main__":
    np.savez(sys.argv[1], allow_pickle=False, **outputs(torch.device("cpu")))
