"""Random checkpoints, and batches for a ModelRunner without a scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.batches import greedy
from executor_service.batch_dimensions import BatchDimensions, pad_tokens, token_rounder
from executor_service.input_batch import InputBatch
from executor_service.kv_cache import KVCache
from executor_service.model_runner import ModelRunner
from executor_service.weights import load_model
from kernels.linear import Quantization
from kernels.sampling import SamplingBatch

CPU = torch.device("cpu")
_FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
_TINY = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def save_checkpoint(directory: Path, family: str, max_shard_size: str = "1GB", **fields: Any) -> Any:
    """A random checkpoint in ``directory``, tiny unless ``fields`` say otherwise; returns transformers' model."""
    config_class, model_class = _FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**_TINY, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # constants as initialised: they would hide a wrong assignment
                parameter.uniform_(0.5, 1.5)
            elif "embed" not in name:  # large enough that positions and neighbours matter
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_()
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


@dataclass
class Run:
    """One request's place: its tokens, how many of them have keys and values, and its blocks."""

    tokens: list[int]
    blocks: list[int]
    computed: int = 0


@dataclass
class Server:
    """A ModelRunner with blocks handed out in random order."""

    runner: ModelRunner
    cache: KVCache
    dtype: torch.dtype
    rng: np.random.Generator
    free: list[int] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        checkpoint: Path,
        dtype: torch.dtype,
        seed: int = 0,
        num_blocks: int = 400,
        block_size: int = 4,
        quantization: Quantization = "none",
    ) -> "Server":
        model = load_model(checkpoint, CPU, dtype)
        cache = KVCache.allocate(model.config, num_blocks, block_size, CPU, dtype)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)  # what nobody wrote must not matter
        rng = np.random.default_rng(seed)
        runner = ModelRunner(model, cache, quantization=quantization)
        return cls(runner, cache, dtype, rng, rng.permutation(num_blocks).tolist())

    def admit(self, tokens: Sequence[int]) -> Run:
        """A request whose blocks hold all of ``tokens``."""
        count = -(-len(tokens) // self.cache.block_size)
        blocks, self.free = self.free[:count], self.free[count:]
        return Run(list(tokens), blocks)

    def release(self, run: Run) -> None:
        self.free.extend(run.blocks)

    def step(self, parts: Sequence[tuple[Run, int]]) -> list[torch.Tensor]:
        """Run the next ``count`` tokens of each request; logits [count, vocabulary] of each, every token sampled."""
        batch = self.batch(parts)
        for run, count in parts:
            run.computed += count
        return list(torch.split(self.runner.compute_logits(batch), [count for _, count in parts]))

    def batch(
        self, parts: Sequence[tuple[Run, int]], sampling: SamplingBatch | None = None, last_only: bool = False
    ) -> InputBatch:
        counts = [count for _, count in parts]
        total = sum(counts)
        padded = pad_tokens(total, token_rounder(CPU, self.dtype, torch.get_num_threads()))
        positions = np.concatenate([np.arange(run.computed, run.computed + count) for run, count in parts])
        ids = np.concatenate([run.tokens[run.computed : run.computed + count] for run, count in parts])
        size, dummy = self.cache.block_size, self.cache.dummy_block
        tables = np.full((len(parts), max(len(run.blocks) for run, _ in parts) + 1), dummy, np.int32)
        for row, (run, _) in enumerate(parts):
            tables[row, : len(run.blocks)] = run.blocks
        owner = np.repeat(np.arange(len(parts)), counts)
        slots = tables[owner, positions // size] * size + positions % size
        start_loc = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        seq_lens = np.array([run.computed + count for run, count in parts], np.int32)
        decodes = counts.count(1)
        indices = start_loc[1:] - 1 if last_only else np.arange(total)
        return InputBatch(
            dimensions=BatchDimensions(total, len(parts) - decodes, decodes),
            input_ids=_padded(ids, padded, 0),
            positions=_padded(positions, padded, 0),
            slot_mapping=_padded(slots, padded, dummy * size),
            query_start_loc=torch.from_numpy(start_loc),
            seq_lens=torch.from_numpy(seq_lens),
            block_tables=torch.from_numpy(tables),
            sample_indices=torch.from_numpy(indices.astype(np.int64)),
            sampling=sampling or greedy(len(indices)),
            host_query_start_loc=start_loc,
            host_seq_lens=seq_lens,
        )


def _padded(values: np.ndarray[Any, Any], size: int, pad: int) -> torch.Tensor:
    out = torch.full((size,), pad, dtype=torch.int64)
    out[: len(values)] = torch.from_numpy(values.astype(np.int64))
    return out
