"""Which variants of the Triton kernels an executor asks for, without a GPU: ``python -m tests.executor.gpu_variants``.

Triton compiles a kernel anew for every combination of what it specialises on: numbers that are 1, multiples of 16 or
neither, addresses that are aligned or not, arguments that are None. A whole executor runs on CPU tensors that stand for
the device's, up to where a kernel would be launched. Prints one JSON object: by kernel, how many variants the warm-up
asked for, and how many more came with the steps after it.
"""

import json
import os

os.environ.pop("TRITON_INTERPRET", None)
os.environ["BATON_KERNELS"] = "reference"  # no native kernels

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime.jit import JITFunction

from executor_service import batch_builder, model_runner
from executor_service.config import ExecutorSettings
from executor_service.metadata.attention import OutputRows
from executor_service.plan_applier import PlanLimits
from executor_service.startup import prepare
from executor_service.step_plan import RowSampling, StepPlan
from executor_service.upload import StagingUploader
from executor_service.warmup import LargestStep, everything
from kernels.gpu import library
from tests.kernels.gpu_compilation import Hopper

from .builders import save_checkpoint

_ROWS, _TOKENS, _LONGEST, _VOCAB, _BLOCK_SIZE = 40, 160, 300, 199, 16
_LIMITS = PlanLimits(_ROWS, _TOKENS, _LONGEST, _VOCAB)

asked: dict[str, set[tuple[str, str]]] = defaultdict(set)


def only_ask(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    *_, bind = self.device_caches[0]
    _, specialisation, settings = bind(*args, **options, debug=False, instrumentation_mode="")
    asked[self.__name__].add((str(specialisation), str(settings)))


def steps() -> Iterator[StepPlan]:
    """One row, a few, and as many as a kernel may take for a multiple of something, by all that they may ask for."""
    step = LargestStep(_LIMITS, _BLOCK_SIZE)
    samplings = (
        RowSampling(num_logprobs=3),
        RowSampling(temperature=1.0),
        RowSampling(temperature=1.0, min_p=0.1, num_logprobs=1, processed_logprobs=True),
        RowSampling(repetition_penalty=1.1),
        everything(_LIMITS),
    )
    for rows in (1, 2, 16, 17, 32):
        for sampling in samplings:
            for tokens in (1, _TOKENS // rows):
                yield step._plan(np.full(rows, tokens, np.int32), sampling)
            uneven = np.ones(rows, np.int32)
            uneven[rows // 2] = 19
            yield step._plan(uneven, sampling, audited=True)


def variants(checkpoint: Path, exact: bool) -> dict[str, Any]:
    settings = ExecutorSettings(
        model=checkpoint,
        device="cpu",
        dtype="bfloat16",
        attention_backend="triton",
        exact=exact,
        max_rows=_ROWS,
        max_batched_tokens=_TOKENS,
        max_model_len=_LONGEST,
        num_blocks=_TOKENS,
    )
    asked.clear()
    launcher = prepare(settings)[0]
    LargestStep(_LIMITS, _BLOCK_SIZE).run(launcher)  # what an executor on a CUDA device does besides
    warmed = {name: len(found) for name, found in asked.items()}
    for plan in steps():
        launcher.launch(plan).wait()
        launcher.reset()
    return {"warmed": warmed, "later": {name: len(found) - warmed.get(name, 0) for name, found in asked.items()}}


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = only_ask
    torch.empty = torch.zeros  # what kernels would have filled is read by torch operations after them
    library.handles = lambda x: True
    library.interpreted = lambda: True
    batch_builder.uploader_to = StagingUploader
    model_runner.output_rows = lambda batch, indices, *_: OutputRows(indices, None)  # as on a device
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(Path(directory), "qwen3", vocab_size=_VOCAB)
        print(json.dumps([variants(Path(directory), exact) for exact in (False, True)]))


if __name__ == "__main__":
    main()
