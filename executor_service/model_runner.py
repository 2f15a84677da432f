"""Runs one step: metadata, inference context, model, logits, sampling."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from executor_service.batch_dimensions import pad_tokens, token_rounder
from executor_service.context import InferenceContext, inference_context
from executor_service.input_batch import InputBatch
from executor_service.kv_cache import KVCache
from executor_service.metadata.attention import build_attention_metadata
from executor_service.models import CausalLM
from executor_service.sampler import sample
from kernels.native.library import selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What a step sampled, in the order of ``InputBatch.sample_indices``, on the model's device."""

    token_ids: Tensor  # int64 [S]; 0 where row_ok is False
    row_ok: Tensor  # bool [S]; False where the row's logits were not finite


class ModelRunner:
    """Owns a model bound to its KV cache and runs steps on it, one after another."""

    def __init__(self, model: CausalLM, kv_cache: KVCache) -> None:
        """Take over ``model``, whose weights are loaded: they are packed for the kernels that run here."""
        model.pack_weights()
        kv_cache.bind(model)
        logger.info("kernels: %s", selection(kv_cache.keys[0]))
        self._model = model
        self._kv_cache = kv_cache

    @torch.inference_mode()
    def run(self, batch: InputBatch) -> SampledTokens:
        """Append the step's keys and values to the cache, and sample. Waits for no value of the device."""
        token_ids, row_ok = sample(self.compute_logits(batch), batch.sampling)
        return SampledTokens(token_ids=token_ids, row_ok=row_ok)

    @torch.inference_mode()
    def compute_logits(self, batch: InputBatch) -> Tensor:
        """Append the step's keys and values to the cache; returns float32 [S, vocabulary] of the sampled rows.

        A row's bits on CPU depend on its own tokens only, if the batch is padded by ``token_rounder``.
        """
        metadata = build_attention_metadata(batch, self._kv_cache.block_size, self._model.config.group_size)
        with inference_context(InferenceContext(attention=metadata)):
            hidden: Tensor = self._model(batch.input_ids, batch.positions)
            return self._sampled_logits(hidden, batch.sample_indices)

    def _sampled_logits(self, hidden: Tensor, sample_indices: Tensor) -> Tensor:
        """The head sees a padded number of rows, like every other matrix product (``token_rounder``)."""
        rows = sample_indices.shape[0]
        padded = pad_tokens(rows, token_rounder(hidden.device, hidden.dtype, torch.get_num_threads()))
        if padded > rows:
            sample_indices = torch.nn.functional.pad(sample_indices, (0, padded - rows))
        return self._model.compute_logits(hidden.index_select(0, sample_indices))[:rows]
