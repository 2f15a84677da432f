"""Shapes of models: everything of a checkpoint but its weights. Needs no torch."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, get_args

__all__ = ["DTYPE_BYTES", "SHAPES", "CheckpointShape", "DType", "Family"]

Family = Literal["qwen3", "qwen2", "llama"]
DType = Literal["bfloat16", "float16", "float32"]

DTYPE_BYTES: Final[Mapping[DType, int]] = types.MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
"""Bytes of one weight."""

_ARCHITECTURES: Final[Mapping[Family, str]] = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


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

    def parameters(self) -> int:
        """The number of weights."""
        return sum(math.prod(dims) for _, dims in self.tensors())

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
