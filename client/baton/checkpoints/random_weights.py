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
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from baton.checkpoints import TINY_PYTHON
from baton.checkpoints._directory import checkpoint_directory, write_json

__all__ = ["SHAPES", "CheckpointShape", "write_random_checkpoint"]

Family = Literal["qwen3", "qwen2", "llama"]
DType = Literal["bfloat16", "float16", "float32"]

_ARCHITECTURES: Final[Mapping[Family, str]] = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
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


@dataclass(frozen=True, kw_only=True)
class CheckpointShape:
    """Everything of a model but its weights, under the names of Hugging Face's config.json.

    Raises:
        ValueError: dimensions that no model of the family can have.
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of the matrices."""

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.family not in get_args(Family):
            raise ValueError(f"family must be one of {', '.join(get_args(Family))}, not {self.family}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.family == "llama" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) of a llama must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.family == "qwen2" and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError("qwen2 has no head_dim of its own: it must be hidden_size / num_attention_heads")

    def config(self, dtype: DType) -> dict[str, Any]:
        """The content of config.json, without the ids of special tokens."""
        config: dict[str, Any] = {"architectures": [_ARCHITECTURES[self.family]], "model_type": self.family}
        config |= {each.name: getattr(self, each.name) for each in fields(self) if each.name != "family"}
        config["rope_scaling"] = None if self.rope_scaling is None else dict(self.rope_scaling)
        config |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True, "torch_dtype": dtype}
        if self.family == "qwen2":
            del config["head_dim"]
        else:
            config["attention_bias"] = False
        return config

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint. Matrices are (outputs, inputs)."""
        hidden, inter = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for index in range(self.num_hidden_layers):
            layer = f"model.layers.{index}."
            yield f"{layer}input_layernorm.weight", (hidden,)
            for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
                yield f"{layer}self_attn.{name}_proj.weight", (outputs, hidden)
                if self.family == "qwen2":
                    yield f"{layer}self_attn.{name}_proj.bias", (outputs,)
            if self.family == "qwen3":
                yield f"{layer}self_attn.q_norm.weight", (self.head_dim,)
                yield f"{layer}self_attn.k_norm.weight", (self.head_dim,)
            yield f"{layer}self_attn.o_proj.weight", (hidden, queries)
            yield f"{layer}post_attention_layernorm.weight", (hidden,)
            yield f"{layer}mlp.gate_proj.weight", (inter, hidden)
            yield f"{layer}mlp.up_proj.weight", (inter, hidden)
            yield f"{layer}mlp.down_proj.weight", (hidden, inter)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)


_QWEN3_TINY: Final = CheckpointShape(
    family="qwen3",
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=4160,  # a little more than the tokenizer has, as in most real checkpoints
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    rope_theta=1e4,
    # At the usual 0.02, layers this narrow add next to nothing to the embedding, and tests would pass without them.
    initializer_range=0.15,
)

SHAPES: Final[Mapping[str, CheckpointShape]] = types.MappingProxyType(
    {
        "qwen3-tiny": _QWEN3_TINY,
        "qwen2-tiny": replace(
            _QWEN3_TINY, family="qwen2", hidden_size=96, head_dim=16, vocab_size=4096, rope_theta=1e6
        ),
        "llama3-tiny": replace(
            _QWEN3_TINY,
            family="llama",
            hidden_size=80,
            num_attention_heads=10,
            head_dim=16,
            vocab_size=4096,
            tie_word_embeddings=False,
            rope_theta=5e5,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            rms_norm_eps=1e-5,
        ),
        "qwen3-small": CheckpointShape(
            family="qwen3",
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=32000,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            rope_theta=1e6,
        ),
        "qwen2-0.5b": CheckpointShape(
            family="qwen2",
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=151936,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            rope_theta=1e6,
        ),
        "qwen3-0.6b": CheckpointShape(
            family="qwen3",
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            rope_theta=1e6,
        ),
        "llama3.2-1b": CheckpointShape(
            family="llama",
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            tie_word_embeddings=True,
            max_position_embeddings=131072,
            rope_theta=5e5,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            rms_norm_eps=1e-5,
        ),
        "qwen3-8b": CheckpointShape(
            family="qwen3",
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=False,
            max_position_embeddings=40960,
            rope_theta=1e6,
        ),
    }
)
"""Shapes by name, smallest first. The ``-tiny`` ones are for tests: odd ratios of heads, head_dim unlike the usual."""


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
    return math.prod(dims) * _DTYPES[dtype][0].itemsize


def _total_bytes(shape: CheckpointShape, dtype: DType) -> int:
    return sum(_tensor_bytes(dims, dtype) for _, dims in shape.tensors())


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
        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=total)
            write_random_checkpoint(
                shape,
                args.out,
                dtype=args.dtype,
                seed=args.seed,
                shard_bytes=None if args.shard_mb is None else args.shard_mb * 1_000_000,
                progress=lambda count: bar.advance(task, count),
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
