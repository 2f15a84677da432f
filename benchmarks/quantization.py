"""What int8 weights change: tokens and logits against bfloat16 weights of the same checkpoint.

``python -m benchmarks.quantization``. Greedy completions come from a cluster each; logits are of every position of the
bfloat16 completions, prompts included, in this process.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from baton import LLM, Completion, SamplingParams
from baton.checkpoints import TINY_PYTHON
from benchmarks.batches import greedy
from benchmarks.checkpoints import add_model_options, cached_checkpoint
from benchmarks.environment import environment
from benchmarks.figures import emit, run_main
from executor_service.batch_dimensions import BatchDimensions
from executor_service.input_batch import InputBatch
from executor_service.kv_cache import KVCache
from executor_service.model_runner import ModelRunner
from executor_service.weights import load_model
from kernels.linear import Quantization

CPU: Final = torch.device("cpu")
BLOCK_SIZE: Final = 16
PROMPTS: Final = (
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):",
    "import os\nimport sys\n\ndef main(",
    "def read_lines(path):\n    with open(",
    "    def __repr__(self):\n        return",
    "for key, value in sorted(",
    "try:\n    import json\nexcept ImportError:",
    "def test_addition(self):\n        self.assert",
)


def complete(checkpoint: Path, quantization: str, prompts: Sequence[str], tokens: int) -> list[Completion]:
    """Greedy completions of a cluster."""
    with LLM(checkpoint, dtype="bfloat16", quantization=quantization, kv_memory="1GiB") as llm:
        return llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))


class Scorer:
    """A checkpoint's logits at every position of a sequence."""

    def __init__(self, checkpoint: Path, quantization: Quantization, longest: int) -> None:
        model = load_model(checkpoint, CPU, torch.bfloat16)
        self._cache = KVCache.allocate(model.config, -(-longest // BLOCK_SIZE), BLOCK_SIZE, CPU, torch.bfloat16)
        self._runner = ModelRunner(model, self._cache, quantization=quantization)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float64 [T, vocabulary]."""
        count = len(tokens)
        starts, lengths = np.array([0, count], np.int32), np.array([count], np.int32)
        batch = InputBatch(
            dimensions=BatchDimensions(count, 1, 0),
            input_ids=torch.tensor(tokens),
            positions=torch.arange(count),
            slot_mapping=torch.arange(count),
            query_start_loc=torch.from_numpy(starts),
            seq_lens=torch.from_numpy(lengths),
            block_tables=torch.arange(self._cache.num_blocks).int()[None],
            sample_indices=torch.arange(count),
            sampling=greedy(count),
            host_query_start_loc=starts,
            host_seq_lens=lengths,
        )
        return self._runner.compute_logits(batch).double()


def compare(name: str, checkpoint: Path, sequences: Sequence[Sequence[int]], **figures: object) -> None:
    """Print how far int8 logits are from those of bfloat16 weights, at every position of ``sequences``."""
    longest = max(map(len, sequences))
    scored = []
    for quantization in ("none", "int8"):
        scorer = Scorer(checkpoint, quantization, longest)  # one at a time in memory
        scored.append(torch.cat([scorer.logits(tokens) for tokens in sequences]))
    plain, quantised = scored
    error = (quantised - plain).abs()
    expected, log_p = plain.softmax(-1), plain.log_softmax(-1)
    divergence = (expected * (log_p - quantised.log_softmax(-1))).sum(-1)
    emit(
        bench="int8 accuracy",
        checkpoint=name,
        positions=len(plain),
        same_best_token=round(float((plain.argmax(-1) == quantised.argmax(-1)).double().mean()), 4),
        logits_std=round(float(plain.std()), 3),
        mean_logit_error=round(float(error.mean()), 4),
        max_logit_error=round(float(error.max()), 3),
        relative_error=round(float((quantised - plain).norm() / plain.norm()), 4),
        mean_kl_nats=float(f"{divergence.mean():.3g}"),
        max_kl_nats=float(f"{divergence.max():.3g}"),
        **figures,
    )


def main() -> None:
    """Print one JSON line per checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__.splitlines()[0])
    add_model_options(parser, shapes=("qwen3-0.6b",))
    parser.add_argument("--tokens", type=int, default=64, help="of each greedy completion (default 64)")
    args = parser.parse_args()
    emit(**environment("torch"), threads=torch.get_num_threads())
    plain, quantised = (complete(TINY_PYTHON, name, PROMPTS, args.tokens) for name in ("", "int8"))
    pairs = [list(zip(a.token_ids, b.token_ids, strict=True)) for a, b in zip(plain, quantised, strict=True)]
    same_until = [next((i for i, (a, b) in enumerate(pair) if a != b), len(pair)) for pair in pairs]
    compare(
        "tiny_python",
        TINY_PYTHON,
        [[*one.prompt_token_ids, *one.token_ids] for one in plain],
        same_greedy_tokens=round(sum(a == b for pair in pairs for a, b in pair) / sum(map(len, pairs)), 4),
        same_completions=f"{sum(first == args.tokens for first in same_until)} of {len(pairs)}",
    )
    for shape in args.shapes:
        tokens = torch.randint(0, 151_000, (2, 64), generator=torch.Generator().manual_seed(0))
        compare(f"{shape}, random weights", cached_checkpoint(shape, args.models), tokens.tolist())


if __name__ == "__main__":
    with torch.inference_mode():
        run_main(main)
