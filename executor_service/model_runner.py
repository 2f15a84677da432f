"""Runs one step: metadata, inference context, model, logits, sampling."""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from executor_service.batch_dimensions import BatchDimensions, pad_tokens, token_rounder
from executor_service.context import InferenceContext
from executor_service.cuda_graphs import Capturer, CaptureReport, StepGraphs
from executor_service.inference_mode import in_inference_mode
from executor_service.input_batch import InputBatch
from executor_service.kv_cache import KVCache
from executor_service.metadata.attention import (
    attention_metadata_of,
    build_attention_metadata,
    output_rows,
)
from executor_service.metadata.step_buffers import StepBuffers, StepInputs
from executor_service.models import CausalLM
from executor_service.recorded_steps import RecordedSteps, Work, hidden_and_logits
from executor_service.sampler import SampledTokens, sample_step
from kernels.gpu import library as gpu_library
from kernels.linear import Quantization, pack
from kernels.native.library import selection
from kernels.paged_attention.backends import AttentionShape, BackendName, choose_backend

logger = logging.getLogger(__name__)


class ModelRunner:
    """Owns a model bound to its KV cache and runs steps on it, one after another.

    Attributes:
        attention: the backend in use, and whether in exact mode, for fingerprints.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        attention_backend: BackendName = "auto",
        exact: bool = False,
        quantization: Quantization = "none",
    ) -> None:
        """Take over ``model``, whose weights are loaded: they are packed for the kernels that run here.

        exact: on a GPU, run kernels in which no row's bits depend on its batch. On CPU they are like that anyway.
        quantization: of all weight matrices but an embedding that is not the head's (``kernels.linear.pack``).
        Raises ``BackendError`` when ``attention_backend`` cannot serve the model, ``QuantizationError`` when there are
        no kernels for such weights.
        """
        keys = kv_cache.keys[0]
        exact = exact and (keys.is_cuda or gpu_library.handles(keys))
        shape = AttentionShape(keys.device, keys.dtype, model.config.head_dim, kv_cache.block_size, exact)
        self._backend = choose_backend(attention_backend, shape)
        model.pack_weights(partial(pack, exact=exact, quantization=quantization))
        weights = "" if quantization == "none" else f", {quantization} weights"
        logger.info("kernels: %s%s%s", selection(keys), weights, ", exact" if exact else "")
        self.attention = f"{self._backend.name}:exact" if exact else self._backend.name
        self._model = model
        self._graphs: StepGraphs | None = None
        self._recorded: RecordedSteps | None = None
        self.use_cache(kv_cache)

    @property
    def is_capturable(self) -> bool:
        """Whether steps can be captured as graphs."""
        return self._backend.is_capturable

    def use_cache(self, kv_cache: KVCache) -> None:
        """Work on ``kv_cache`` from now on; graphs and recordings of another one are gone."""
        kv_cache.bind(self._model, self._backend)
        self._kv_cache = kv_cache
        self._graphs = None
        self._recorded = None

    @property
    def is_recordable(self) -> bool:
        """Whether steps can be recorded: all that layers do is call native kernels."""
        return self._backend.name == "native"

    @in_inference_mode
    def record_steps(self, max_tokens: int, max_rows: int, max_blocks: int) -> None:
        """Record steps before they run, with block tables of up to ``max_blocks``. The memory of a step of
        ``max_tokens`` is taken at once: raises ``MemoryError`` if it is not there.
        """
        block_size, group_size = self._kv_cache.block_size, self._model.config.group_size
        self._recorded = RecordedSteps(self._model, max_tokens, max_rows, max_blocks, block_size, group_size)

    @torch.inference_mode()
    def capture(self, sizes: Sequence[BatchDimensions], max_blocks: int, capturer: Capturer) -> CaptureReport:
        """Capture graphs of steps of ``sizes`` with block tables of ``max_blocks``; later steps run in them."""
        buffers = StepBuffers(
            max(size.tokens for size in sizes),
            max(size.requests for size in sizes),
            max_blocks,
            self._kv_cache.dummy_block,
            self._kv_cache.block_size,
            self._kv_cache.keys[0].device,
        )
        self._graphs = StepGraphs(self._forward_static, buffers, sizes, capturer)
        return self._graphs.report

    @in_inference_mode
    def run(self, batch: InputBatch) -> SampledTokens:
        """Append the step's keys and values to the cache, and sample. Waits for no value of the device."""
        hidden, logits = self._hidden(batch)
        return sample_step(partial(self._logits_at, hidden), batch, logits)

    @torch.inference_mode()
    def compute_logits(self, batch: InputBatch) -> Tensor:
        """Append the step's keys and values to the cache; returns float32 [S, vocabulary] of the sampled rows, valid
        until the next step.

        A row's bits on CPU depend on its own tokens only, if the batch is padded by ``token_rounder``.
        """
        hidden, logits = self._hidden(batch)
        return self._logits_at(hidden, batch.sample_indices) if logits is None else logits

    def _hidden(self, batch: InputBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states, and the sampled rows' logits where they came with them."""
        if self._recorded is not None and (decoded := self._recorded.decode(batch)) is not None:
            return decoded
        if self._graphs is not None and (replayed := self._graphs.run(batch)) is not None:
            return replayed, None
        block_size, group_size = self._kv_cache.block_size, self._model.config.group_size
        metadata = build_attention_metadata(batch, block_size, group_size)
        rows = None
        if batch.prompt_targets is None and not batch.audits:
            rows = output_rows(batch, self._padded(batch.sample_indices), block_size, group_size)
        hidden, *head = self._compute(batch, InferenceContext(metadata, rows))
        return hidden, head[0][: batch.sample_indices.shape[0]] if head else None

    def _compute(self, batch: InputBatch, context: InferenceContext) -> tuple[Tensor, ...]:
        if self._recorded is not None:
            return self._recorded.compute(batch, context)
        return hidden_and_logits(self._model, partial(self._model, batch.input_ids, batch.positions), context)

    def _run(self, work: Work) -> tuple[Tensor, ...]:
        return work() if self._recorded is None else self._recorded.run(work)

    def _forward_static(self, inputs: StepInputs) -> Tensor:
        metadata = attention_metadata_of(inputs, self._kv_cache.block_size, self._model.config.group_size)
        (hidden,) = hidden_and_logits(
            self._model, partial(self._model, inputs.input_ids, inputs.positions), InferenceContext(metadata)
        )
        return hidden

    def _logits_at(self, hidden: Tensor, indices: Tensor) -> Tensor:
        padded = self._padded(indices)
        (logits,) = self._run(lambda: (self._model.compute_logits(hidden.index_select(0, padded)),))
        return logits[: indices.shape[0]]

    def _padded(self, indices: Tensor) -> Tensor:
        """As many indices as a matrix product needs rows (``token_rounder``); what is added repeats the first token."""
        keys = self._kv_cache.keys[0]
        rows = indices.shape[0]
        padded = pad_tokens(rows, token_rounder(keys.device, keys.dtype, torch.get_num_threads()))
        return torch.nn.functional.pad(indices, (0, padded - rows)) if padded > rows else indices
