"""Speed of the CPU kernels: linear layers, paged attention, norms, appends, and whole steps through ModelRunner.

``make bench-kernels``, which keeps OpenMP from spinning. Everything that is compared alternates within one run, with a
plain read of the same bytes beside it: bandwidth drifts, and others use the cores. Only ratios within one line mean
anything.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.attention_figures import bench_append, bench_attention, bench_norm, bench_prefill
from benchmarks.batches import greedy
from benchmarks.checkpoints import add_model_options, cached_checkpoint
from benchmarks.contenders import alternate, read, reference_kernels
from benchmarks.environment import environment
from benchmarks.figures import emit, run_main
from benchmarks.machine import ForeignLoad
from executor_service.batch_dimensions import BatchDimensions, pad_tokens, token_rounder
from executor_service.input_batch import InputBatch
from executor_service.kv_cache import KVCache
from executor_service.model_runner import ModelRunner
from executor_service.weights import load_model
from kernels.linear import Matrix, PackedMatrix, linear, pack
from kernels.native import library

CPU = torch.device("cpu")
BLOCK_SIZE = 16
CONTEXT = 512  # tokens that each decoding request has
LINEARS = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}  # of Qwen3-0.6B
LAYERS = 28
HEAD = (151_936, 1024)


def bench_linear(repeats: int) -> None:
    """All weight matrices of Qwen3-0.6B, one after another as in a step."""
    torch.manual_seed(0)
    shapes = [*(list(LINEARS.values()) * LAYERS), HEAD]
    plain = [torch.empty(shape, dtype=torch.bfloat16).normal_() for shape in shapes]
    packed = [pack(weight) for weight in plain]
    stored = [matrix.blocks.flatten() for matrix in packed if isinstance(matrix, PackedMatrix)]
    weight_bytes = sum(weight.nbytes for weight in plain)
    for rows in (1, 4, 16, 64, 256):
        inputs = {columns: torch.randn(rows, columns).bfloat16() for _, columns in shapes}

        def own(inputs: dict[int, Tensor] = inputs) -> None:
            for weight, (_, columns) in zip(packed, shapes, strict=True):
                linear(inputs[columns], weight, None, None)

        def torch_linear(inputs: dict[int, Tensor] = inputs) -> None:
            for weight, (_, columns) in zip(plain, shapes, strict=True):
                torch.nn.functional.linear(inputs[columns], weight)

        others = ForeignLoad()
        times = alternate({"own": own, "torch": torch_linear, "read": lambda: read(stored)}, repeats)
        emit(
            bench="linear",
            rows=rows,
            own_ms=times["own"],
            torch_ms=times["torch"],
            speedup=round(times["torch"] / times["own"], 2),
            read_ms=times["read"],
            own_gb_per_s=round(weight_bytes / times["own"] / 1e6, 1),
            read_gb_per_s=round(weight_bytes / times["read"] / 1e6, 1),
            own_gflops=round(rows * weight_bytes / times["own"] / 1e6),
            foreign_cores=others.cores(),
        )


def bench_int8(repeats: int) -> None:
    """All weight matrices of Qwen3-0.6B as int8 against bfloat16, one after another as in a step."""
    torch.manual_seed(0)
    shapes = [*(list(LINEARS.values()) * LAYERS), HEAD]
    wide: list[Matrix] = []
    narrow: list[Matrix] = []
    for shape in shapes:
        weight = torch.empty(shape, dtype=torch.bfloat16).normal_()
        wide.append(pack(weight))
        narrow.append(pack(weight, quantization="int8"))
    stored = [matrix.blocks.flatten() for matrix in wide if isinstance(matrix, PackedMatrix)]
    for rows in (1, 2, 4, 16, 64, 256):
        inputs = {columns: torch.randn(rows, columns).bfloat16() for _, columns in shapes}

        def run(matrices: list[Matrix], inputs: dict[int, Tensor] = inputs) -> None:
            for weight, (_, columns) in zip(matrices, shapes, strict=True):
                linear(inputs[columns], weight, None, None)

        others = ForeignLoad()
        contenders = {"int8": partial(run, narrow), "bf16": partial(run, wide), "read": partial(read, stored)}
        times = alternate(contenders, repeats)
        emit(
            bench="int8",
            rows=rows,
            int8_ms=times["int8"],
            bf16_ms=times["bf16"],
            speedup=round(times["bf16"] / times["int8"], 2),
            read_bf16_ms=times["read"],
            foreign_cores=others.cores(),
        )


def decode_batch(rows: int, vocab_size: int, rounder: int, dummy_block: int) -> InputBatch:
    """``rows`` requests with a context of ``CONTEXT`` tokens, in blocks of random order, decode greedily."""
    width = CONTEXT // BLOCK_SIZE
    tables = torch.randperm(rows * width).view(rows, width).int()
    padding = pad_tokens(rows, rounder) - rows
    slots = tables[:, -1].long() * BLOCK_SIZE + BLOCK_SIZE - 1
    starts, lengths = np.arange(rows + 1, dtype=np.int32), np.full(rows, CONTEXT, np.int32)
    return InputBatch(
        dimensions=BatchDimensions(rows, 0, rows),
        input_ids=torch.randint(0, vocab_size, (rows + padding,)),
        positions=torch.full((rows + padding,), CONTEXT - 1),
        slot_mapping=torch.nn.functional.pad(slots, (0, padding), value=dummy_block * BLOCK_SIZE),
        query_start_loc=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(lengths),
        block_tables=tables,
        sample_indices=torch.arange(rows),
        sampling=greedy(rows),
        host_query_start_loc=starts,
        host_seq_lens=lengths,
    )


def bench_decode(shape: str, checkpoint: Path, repeats: int) -> None:
    """Whole decode steps, native against reference kernels."""
    rows = (1, 16, 64)

    def prepared() -> tuple[list[Callable[[], object]], int]:
        """A step of each batch size on a model of the kernels in use, and the bytes of its weights."""
        model = load_model(checkpoint, CPU, torch.bfloat16)
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        cache = KVCache.allocate(model.config, max(rows) * CONTEXT // BLOCK_SIZE, BLOCK_SIZE, CPU, torch.bfloat16)
        runner = ModelRunner(model, cache)
        rounder = token_rounder(CPU, torch.bfloat16, torch.get_num_threads())
        batches = [decode_batch(count, model.config.vocab_size, rounder, cache.dummy_block) for count in rows]
        return [partial(runner.run, batch) for batch in batches], weight_bytes

    own_steps, weight_bytes = prepared()
    with reference_kernels():
        reference_steps, _ = prepared()
    memory = torch.ones(weight_bytes // 8, dtype=torch.int64)
    for count, own, reference in zip(rows, own_steps, reference_steps, strict=True):

        def run_reference(reference: Callable[[], object] = reference) -> None:
            with reference_kernels():
                reference()

        others = ForeignLoad()
        times = alternate({"own": own, "reference": run_reference, "read": lambda: read([memory])}, repeats)
        emit(
            bench="decode step",
            shape=shape,
            rows=count,
            context=CONTEXT,
            own_ms=times["own"],
            reference_ms=times["reference"],
            speedup=round(times["reference"] / times["own"], 2),
            read_weights_ms=times["read"],
            tokens_per_s=round(count / times["own"] * 1e3, 1),
            foreign_cores=others.cores(),
        )


def main() -> None:
    """Run what was asked for."""
    benches = {
        "linear": bench_linear,
        "int8": bench_int8,
        "attention": bench_attention,
        "prefill": bench_prefill,
        "append": bench_append,
        "norm": bench_norm,
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--only", choices=[*benches, "decode"], help="one group of figures")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each measurement (default 7)")
    args = parser.parse_args()
    example = torch.zeros(1, dtype=torch.bfloat16)
    emit(**environment("torch"), threads=torch.get_num_threads(), kernels=library.selection(example))
    with torch.inference_mode():
        for group, bench in benches.items():
            if args.only in {None, group}:
                bench(args.repeats)
                gc.collect()
        if args.only in {None, "decode"}:
            for shape in args.shapes:
                bench_decode(shape, cached_checkpoint(shape, args.models), args.repeats)


if __name__ == "__main__":
    run_main(main)
