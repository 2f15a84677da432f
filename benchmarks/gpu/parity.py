"""The compiled kernels against the same kernels in Triton's interpreter: what the compiler made of them is right.

``python -m benchmarks.gpu.parity FILE`` writes the interpreter's outputs; needs ``TRITON_INTERPRET=1``.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.cases import AttentionShape, attention_case, random, sampling_batch
from benchmarks.gpu.records import Record, check, guarded, relative_error

_LIMIT = 1e-3
_BY_BIT = {"tokens", "append"}


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every kernel on small inputs, in float16 and float32: what computes an output, and its name."""
    from kernels.activation import gpu as activation
    from kernels.linear import gpu as linear
    from kernels.paged_attention import gpu as attention
    from kernels.rms_norm import gpu as norm
    from kernels.rotary import gpu as rotary

    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        case = attention_case([(300, 5), (70, 1), (9, 9)], AttentionShape(6, 2, 20, 16), device, dtype, padding=2)
        attend = partial(attention.paged_attention, case.query, case.key_cache, case.value_cache, case.plan, case.scale)
        for side_by_side in (False, True):
            yield f"attention.{side_by_side}.{name}", partial(attend, side_by_side=side_by_side)
        x, weight = random((20, 70), device, dtype, 0), random((50, 70), device, dtype, 1)
        yield f"linear.{name}", partial(linear.linear, x, weight, None, torch.float32)
        yield f"norm.{name}", partial(norm.rms_norm, x, weight[0].contiguous(), 1e-6)
        yield f"activation.{name}", partial(activation.silu_and_mul, x)
        heads, angles = random((4, 3, 20), device, dtype, 2), random((4, 10), device, torch.float32, 3)
        yield f"rotary.{name}", partial(rotary.norm_rotary, heads, None, 0.0, angles.cos(), angles.sin())
        yield f"append.{name}", partial(_appended, heads)
        yield f"rotary_append.{name}", partial(_rotated_and_appended, heads, angles)
    logits = random((3, 3000), device, torch.float32, 4, scale=3.0)
    for filtered in (False, True):
        for field in ("tokens", "logprobs"):
            yield f"{field}.{filtered}", partial(_sampled, logits, filtered, field)


def _appended(heads: Tensor) -> Tensor:
    from kernels.kv_append import gpu as append

    cache = torch.zeros((2, 3, 4, 3, 20), device=heads.device, dtype=heads.dtype)
    append.kv_append(heads, heads, cache[0], cache[1], torch.tensor([7, 2, 11, 0], device=heads.device))
    return cache


def _rotated_and_appended(heads: Tensor, angles: Tensor) -> Tensor:
    from kernels.rotary_append import Rotation
    from kernels.rotary_append import gpu as rotary_append

    norm = random((20,), heads.device, heads.dtype, 5)
    rotation = Rotation(angles.cos(), angles.sin(), norm, norm, 1e-6)
    cache = torch.zeros((2, 3, 4, 3, 20), device=heads.device, dtype=heads.dtype)
    slots = torch.tensor([7, 2, 11, 0], device=heads.device)
    rotated = rotary_append.rotary_append(heads, heads, heads, rotation, cache[0], cache[1], slots)
    return torch.cat([rotated.flatten(), cache.flatten()])


def _sampled(logits: Tensor, filtered: bool, field: str) -> Tensor:
    from kernels.sampling import gpu as sampling

    batch = sampling_batch(3, logits.device, filtered=filtered, num_top=2)
    sampled = sampling.sample(logits, batch, chunk=1024)
    assert sampled.logprobs is not None
    return sampled.token_ids if field == "tokens" else sampled.logprobs.logprobs


def check_parity(device: torch.device) -> Iterator[Record]:
    """Compare both; on a CPU there is nothing to compare."""
    if device.type == "cpu":
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "interpreted.npz"
        command = [sys.executable, "-m", "benchmarks.gpu.parity", str(path)]
        subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
        with np.load(path) as interpreted:
            for name, compute in cases(device):
                yield from guarded("parity", _compared(name, compute, interpreted[name]), kernel=name)


def _compared(name: str, compute: Callable[[], Tensor], interpreted: NDArray[np.float32]) -> Iterator[Record]:
    output, expected = compute().float().cpu(), torch.from_numpy(interpreted)
    if name.partition(".")[0] in _BY_BIT:
        yield check("parity by bit", torch.equal(output, expected), kernel=name)
    else:
        error = relative_error(output, expected)
        yield check("parity", error < _LIMIT, kernel=name, error=error)


if __name__ == "__main__":
    made = {name: compute().float().numpy() for name, compute in cases(torch.device("cpu"))}
    np.savez(sys.argv[1], allow_pickle=False, **made)
