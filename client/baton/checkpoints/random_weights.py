"""Write checkpoints of real shapes with random weights, for tests and benchmarks.

    python -m baton.checkpoints.random_weights --shape qwen3-0.6b --out DIR [--dtype bfloat16] [--set key=value ...]

They load wherever the real ones do (Hugging Face directories: configuration, safetensors, tokenizer) and say nothing
sensible. A tensor depends on the seed and its name alone: neither sharding, nor tying, nor the number of layers changes
the others, and another type only rounds them differently. Memory stays small whatever the size of the checkpoint.

Needs torch (``pip install 'baton[executor]'``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final, get_args

import torch
from rich.console import Console

from baton.checkpoints import TINY_PYTHON
from baton.checkpoints._directory import checkpoint_directory, write_json
from baton.checkpoints.shapes import DTYPE_BYTES, SHAPES, CheckpointShape, DType, Family
from baton.progress import byte_progress

__all__ = ["SHAPES", "CheckpointShape", "write_random_checkpoint"]

_DTYPES: Final[Mapping[DType, tuple[torch.dtype, str]]] = {  # and what safetensors calls them
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
_COPIED_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_CHUNK_ELEMENTS: Final = 1 << 24

# Noise, because real norms and biases are no ones and zeros, and code that drops or misplaces one shall be found out.
_NORM_STD: Final = 0.05
_BIAS_STD: Final = 0.1


def write_random_checkpoint(
    shape: CheckpointShape,
    out: Path,
    *,
    dtype: DType = "bfloat16",
    seed: int = 0,
    shard_bytes: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a checkpoint of `shape` as the directory `out`, whole or not at all; an earlier checkpoint is replaced.

    The tokenizer and its chat template are tiny_python's; `shape.vocab_size` may be larger than its vocabulary.

    Args:
        dtype: type of all tensors.
        seed: the same seed gives the same bytes.
        shard_bytes: split the weights into files of at most this many bytes of tensors (a larger tensor gets a file to
            itself) with an index; None for a single file.
        progress: called with the number of bytes after every piece written.

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer's, or `shard_bytes` is not positive.
        FileExistsError: `out` exists and is not a checkpoint.
        OSError: `out` cannot be written.
    """
    tokenizer_size = len(json.loads((TINY_PYTHON / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    if shape.vocab_size < tokenizer_size:
        raise ValueError(f"vocab_size must be at least the tokenizer's {tokenizer_size}, not {shape.vocab_size}")
    if shard_bytes is not None and shard_bytes <= 0:
        raise ValueError(f"shard_bytes must be positive, not {shard_bytes}")
    generation = json.loads((TINY_PYTHON / "generation_config.json").read_text(encoding="utf-8"))
    with checkpoint_directory(out) as directory:
        write_json(directory / "config.json", shape.config(dtype) | generation)
        for name in _COPIED_FILES:
            shutil.copyfile(TINY_PYTHON / name, directory / name)
        shards = _split(shape, dtype, shard_bytes)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            metadata = {"total_size": _total_bytes(shape, dtype)}
            write_json(directory / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
        for name, shard in zip(names, shards, strict=True):
            with (directory / name).open("wb") as file:
                _write_shard(file, shard, dtype, seed, shape.initializer_range, progress or (lambda _: None))


def _tensor_bytes(dims: tuple[int, ...], dtype: DType) -> int:
    return math.prod(dims) * DTYPE_BYTES[dtype]


def _total_bytes(shape: CheckpointShape, dtype: DType) -> int:
    return shape.parameters() * DTYPE_BYTES[dtype]


def _split(shape: CheckpointShape, dtype: DType, limit: int | None) -> list[dict[str, tuple[int, ...]]]:
    """The tensors' shapes by name, in order, cut into runs of at most `limit` bytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dims in shape.tensors():
        size = _tensor_bytes(dims, dtype)
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = dims
        filled += size
    return shards


def _write_shard(
    file: BinaryIO,
    shard: Mapping[str, tuple[int, ...]],
    dtype: DType,
    seed: int,
    std: float,
    progress: Callable[[int], object],
) -> None:
    """Write one safetensors file, drawing its tensors piece by piece.

    The layout is written here because safetensors' own writer wants all tensors of a file in memory at once.
    """
    torch_dtype, code = _DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in shard.items():
        end = offset + _tensor_bytes(dims, dtype)
        header[name] = {"dtype": code, "shape": dims, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    generator = torch.Generator()
    for name, dims in shard.items():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        mean, deviation = 0.0, std
        if name.endswith("norm.weight"):
            mean, deviation = 1.0, _NORM_STD
        elif name.endswith(".bias"):
            deviation = _BIAS_STD
        left = math.prod(dims)
        while left:
            count = min(left, _CHUNK_ELEMENTS)
            piece = torch.empty(count).normal_(mean, deviation, generator=generator).to(torch_dtype)
            progress(file.write(piece.view(torch.uint8).numpy().data))
            left -= count


def _parse_setting(setting: str) -> tuple[str, object]:
    """Split a ``key=value`` of the command line and read the value as the type of that field of `CheckpointShape`."""
    key, equals, text = setting.partition("=")
    expected = typing.get_type_hints(CheckpointShape)
    if not equals or key not in expected:
        raise argparse.ArgumentTypeError(f"{setting!r} is not key=value with a key of {', '.join(expected)}")
    kind = expected[key]
    try:
        value = text if kind == Family else json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{key}: {text!r} is not JSON ({error})") from None
    if kind in {int, bool}:
        valid = type(value) is kind
    elif kind is float:
        valid = type(value) in {int, float}
    elif kind == Family:
        valid = value in get_args(Family)
    else:
        valid = value is None or isinstance(value, dict)
    if not valid:
        wanted = getattr(kind, "__name__", None) or str(kind)
        raise argparse.ArgumentTypeError(f"{key}: {text!r} is not of type {wanted}")
    return key, value


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m baton.checkpoints.random_weights",
        description="Write a checkpoint with random weights, for tests and benchmarks.",
    )
    parser.add_argument("--shape", required=True, choices=SHAPES, help="the model to imitate")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; an earlier checkpoint is replaced")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="type of the weights (default bfloat16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        type=_parse_setting,
        nargs="+",
        action="extend",
        default=[],
        help="change the shape, by the names of config.json: num_hidden_layers=4 max_position_embeddings=8192",
    )
    parser.add_argument(
        "--tie",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="share the embedding with the output layer, or not (default: as the shape does)",
    )
    parser.add_argument("--shard-mb", type=int, metavar="N", help="split the weights into files of N MB (10^6 bytes)")
    args = parser.parse_args(argv)
    changes = dict(args.settings)
    if args.tie is not None:
        changes["tie_word_embeddings"] = args.tie
    console = Console(stderr=True)
    try:
        shape = replace(SHAPES[args.shape], **changes)
        total = _total_bytes(shape, args.dtype)
        with byte_progress(total) as progress:
            write_random_checkpoint(
                shape,
                args.out,
                dtype=args.dtype,
                seed=args.seed,
                shard_bytes=None if args.shard_mb is None else args.shard_mb * 1_000_000,
                progress=progress,
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; nothing was written to {args.out}", highlight=False)
        return 130
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    print(f"{args.out}: {args.shape}, {args.dtype}, {total / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
