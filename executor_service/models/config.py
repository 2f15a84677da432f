"""Configuration of a checkpoint: what the models here need, read from Hugging Face's config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor_service.layers.rotary import Llama3Scaling, RopeConfig

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class UnsupportedCheckpointError(ValueError):
    """The checkpoint is incomplete or needs something that is not implemented; the message says what, in one line."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only transformer with grouped-query attention and gated feed-forward layers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # of attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head before rotary
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Query heads per key-value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes in code rather than in config.json."""

    qkv_bias: bool | None = None  # None: attention_bias decides, for the output projection too
    mlp_bias: bool = False  # config.json may ask for it
    qk_norm: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family(mlp_bias=True),
    "Qwen2ForCausalLM": _Family(qkv_bias=True),
    "Qwen3ForCausalLM": _Family(qk_norm=True),
}


def load_config(checkpoint: Path) -> ModelConfig:
    """Read ``checkpoint/config.json``.

    Raises ``UnsupportedCheckpointError`` when it is missing or malformed, or asks for what is not implemented.
    """
    path = checkpoint / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnsupportedCheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UnsupportedCheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UnsupportedCheckpointError(f"{path} does not hold a JSON object")
    try:
        return parse_config(raw)
    except UnsupportedCheckpointError:
        raise
    except KeyError as error:
        raise UnsupportedCheckpointError(f"{path} lacks {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise UnsupportedCheckpointError(f"{path} holds a value of the wrong type: {error}") from error


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Turn the fields of a config.json into a ``ModelConfig``.

    Raises ``UnsupportedCheckpointError`` for what is not implemented, ``KeyError`` naming a missing field, and
    ``TypeError`` or ``ValueError`` for a value that is no number where one is due.
    """
    family = _family(raw)
    _refuse_unsupported(raw)
    heads, hidden_size = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    kv_heads = int(_or_default(raw, "num_key_value_heads", heads))
    if heads % kv_heads:
        raise UnsupportedCheckpointError(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
    attention_bias = bool(raw.get("attention_bias", False))
    head_dim = int(_or_default(raw, "head_dim", hidden_size // heads))
    return ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(raw["intermediate_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=int(raw["max_position_embeddings"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_parse_rope(raw, head_dim),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias and family.qkv_bias is None,
        mlp_bias=family.mlp_bias and bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        dtype=_parse_dtype(raw),
    )


def _or_default(raw: Mapping[str, Any], name: str, default: int) -> Any:
    """A field that checkpoints leave out or set to null when it has the obvious value."""
    value = raw.get(name)
    return default if value is None else value


def _family(raw: Mapping[str, Any]) -> _Family:
    architectures = raw.get("architectures") or ["none"]
    family = _FAMILIES.get(architectures[0])
    if family is None:
        supported = ", ".join(_FAMILIES)
        raise UnsupportedCheckpointError(f"architecture {architectures[0]} is not supported; supported: {supported}")
    return family


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise UnsupportedCheckpointError(f"quantised checkpoints are not supported ({method})")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedCheckpointError(f"activation {raw['hidden_act']} is not supported; supported: silu")
    if _uses_sliding_window(raw):
        raise UnsupportedCheckpointError(f"sliding-window attention ({raw['sliding_window']}) is not supported")


def _uses_sliding_window(raw: Mapping[str, Any]) -> bool:
    """Whether any layer's window is switched on; published configs carry one that is off."""
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window") is None:
        return False
    if raw.get("layer_types"):
        return any(kind != "full_attention" for kind in raw["layer_types"])
    return int(raw.get("max_window_layers", 0)) < int(raw["num_hidden_layers"])


def _parse_rope(raw: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Read both styles: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters`` (transformers 5) for both."""
    fields = {"rope_theta": raw.get("rope_theta", 10_000.0), **(raw.get("rope_scaling") or {})}
    fields.update(raw.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in fields.values()):
        raise UnsupportedCheckpointError("rotary parameters per layer type are not supported")
    kind = fields.get("rope_type", fields.get("type", "default"))
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedCheckpointError(f"partial rotary embedding ({partial}) is not supported")
    theta = float(fields["rope_theta"])
    match kind:
        case "default":
            return RopeConfig(head_dim, theta)
        case "linear":
            return RopeConfig(head_dim, theta, factor=float(fields["factor"]))
        case "llama3":
            scaling = Llama3Scaling(
                low_freq_factor=float(fields["low_freq_factor"]),
                high_freq_factor=float(fields["high_freq_factor"]),
                original_max_position=int(fields["original_max_position_embeddings"]),
            )
            return RopeConfig(head_dim, theta, factor=float(fields["factor"]), llama3=scaling)
        case _:
            raise UnsupportedCheckpointError(
                f"rope scaling {kind!r} is not supported; supported: default, linear, llama3"
            )


def _parse_dtype(raw: Mapping[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise UnsupportedCheckpointError(f"dtype {name} is not supported; supported: {', '.join(_DTYPES)}")
    return _DTYPES[name]
