"""The dense decoder-only transformer of the Llama, Qwen2 and Qwen3 families; ``ModelConfig`` says how they differ."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from executor_service.context import get_context
from executor_service.layers.attention import Attention
from executor_service.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from executor_service.layers.linear import MergedColumnParallelLinear, Packer, RowParallelLinear, empty_parameter
from executor_service.layers.norm import RMSNorm
from executor_service.layers.rotary import RotaryEmbedding
from executor_service.metadata.attention import OutputRows
from executor_service.models.config import ModelConfig
from kernels.native.heads import join_heads, split_heads
from kernels.rotary_append import Rotation


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, in Qwen3 with normalised query and key heads."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._head_dim = config.head_dim
        self._heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        query_size, kv_size, _ = (heads * config.head_dim for heads in self._heads)
        projections = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = MergedColumnParallelLinear(config.hidden_size, projections, config.qkv_bias, device, dtype)
        self.o_proj = RowParallelLinear(query_size, config.hidden_size, config.output_bias, device, dtype)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, device, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, device, dtype) if config.qk_norm else None
        self.attention = Attention(config.head_dim)

    def forward(
        self, hidden: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, rows: OutputRows | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """[T, hidden], and what is to be added to it as of ``RowParallelLinear``, or [S, hidden] of these rows; cos and
        sin as in ``RotaryEmbedding.angles``.
        """
        if rows is None or rows.plan is None:
            query, key, value = split_heads(self.qkv_proj(hidden), self._heads, self._head_dim)
        else:
            projected, others = self.qkv_proj.first_of_rows(hidden, rows.indices)
            (query,) = split_heads(projected, self._heads[:1], self._head_dim)
            key, value = split_heads(others, self._heads[1:], self._head_dim)
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is not None and k_norm is not None:
            rotation = Rotation(cos, sin, q_norm.weight, k_norm.weight, q_norm.eps)
        else:
            rotation = Rotation(cos, sin)
        attended = join_heads(self.attention(query, key, value, rotation, rows))
        if rows is not None:
            residual = residual.index_select(0, rows.indices)
        output: tuple[Tensor | None, Tensor] = self.o_proj(attended, residual)
        return output


class FeedForward(nn.Module):
    """SiLU-gated feed-forward layer."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        projections = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, projections, config.mlp_bias, device, dtype, gated=True
        )
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, config.mlp_bias, device, dtype)

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor | None, Tensor]:
        """[T, hidden], and what is to be added to it as of ``RowParallelLinear``."""
        output: tuple[Tensor | None, Tensor] = self.down_proj(self.gate_up_proj(hidden), residual)
        return output


class DecoderLayer(nn.Module):
    """Attention and feed-forward with their norms; the residual stream is passed beside what is to be added to it."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, device, dtype)
        self.mlp = FeedForward(config, device, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)

    def forward(
        self, pending: Tensor | None, residual: Tensor, cos: Tensor, sin: Tensor, rows: OutputRows | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """(what is not yet added, residual), both [T, hidden], or [S, hidden] of these rows. Takes the same, and may
        write over it.
        """
        hidden, residual = self.input_layernorm.add(pending, residual)
        pending, residual = self.self_attn(hidden, residual, cos, sin, rows)
        hidden, residual = self.post_attention_layernorm.add(pending, residual)
        output: tuple[Tensor | None, Tensor] = self.mlp(hidden, residual)
        return output


class CausalLM(nn.Module):
    """A language model over a paged KV cache. Parameters are uninitialised until a checkpoint is loaded."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, device, dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, device, dtype) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.lm_head = ParallelLMHead(
            self.embed_tokens.weight
            if config.tie_word_embeddings
            else empty_parameter((config.vocab_size, config.hidden_size), device, dtype)
        )
        self._rotary = RotaryEmbedding(config.rope, device, dtype)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """int64 [T] token ids and positions to normalised hidden states [T, hidden], or [S, hidden] of those tokens
        that the inference context wants: of the others the last layer computes keys and values only.
        """
        return self.last_layer(*self.first_layers(input_ids, positions))

    def first_layers(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """All layers but the last: what it takes, none of which depends on the tokens that are wanted."""
        cos, sin = self._rotary.angles(positions)
        pending: Tensor | None = None
        residual: Tensor = self.embed_tokens(input_ids)
        for layer in self.layers[:-1]:
            pending, residual = layer(pending, residual, cos, sin)
        return pending, residual, cos, sin

    def last_layer(self, pending: Tensor | None, residual: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The rest of ``forward``, which may write over what it takes."""
        pending, residual = self.layers[-1](pending, residual, cos, sin, get_context().output_rows)
        return self.norm.add(pending, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, hidden] to float32 [S, vocabulary]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def attention_layers(self) -> list[Attention]:
        """In layer order; each takes one pair of tensors of a KV cache."""
        return [module.attention for module in self.layers.modules() if isinstance(module, SelfAttention)]

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a Hugging Face checkpoint, the part of a parameter that it fills), each tensor once."""
        yield "model.embed_tokens.weight", self.embed_tokens.weight
        yield "model.norm.weight", self.norm.weight
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self.lm_head.weight
        for name, module in self.layers.named_modules(prefix="model.layers"):
            if isinstance(module, MergedColumnParallelLinear):
                parent = name.rpartition(".")[0]
                yield from ((f"{parent}.{part}", tensor) for part, tensor in module.checkpoint_tensors())
            else:
                yield from module.named_parameters(prefix=name, recurse=False)

    def pack_weights(self, packer: Packer) -> None:
        """Put loaded weights into the layout that kernels read fastest, one by one: none is held twice. Once only."""
        for module in self.layers.modules():
            if isinstance(module, MergedColumnParallelLinear | RowParallelLinear):
                module.pack_weight(packer)
        matrix = self.lm_head.pack_weight(packer)
        if self.config.tie_word_embeddings:
            self.embed_tokens.share(matrix)
