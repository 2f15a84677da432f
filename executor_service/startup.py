"""Puts an executor together from its settings."""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from executor_service.batch_builder import BatchBuilder
from executor_service.batch_dimensions import token_rounder
from executor_service.block_tables import BlockTables
from executor_service.completion import Completer, InlineCompleter, ThreadCompleter
from executor_service.config import ConfigError, ExecutorSettings
from executor_service.cuda_graphs import CaptureReport, CudaCapturer, graph_sizes
from executor_service.curve import KeyFileError, load_keys
from executor_service.endpoints import EndpointError
from executor_service.executor import Executor, StepLauncher
from executor_service.fingerprint import kernel_fingerprint, model_fingerprint
from executor_service.grammar import GrammarRows
from executor_service.grammar_compiler import GrammarCompiler
from executor_service.inbox import Inbox, Stop
from executor_service.kv_cache import KVCache
from executor_service.link import Link
from executor_service.masks import MaskSource
from executor_service.memory import available_ram, default_kv_bytes, peak_bytes
from executor_service.metrics import ExecutorMetrics, MeteredLauncher, MeteredLink, serve_metrics
from executor_service.model_runner import ModelRunner
from executor_service.models import CausalLM, ModelConfig, UnsupportedCheckpointError, load_config
from executor_service.plan_applier import PlanApplier, PlanLimits
from executor_service.row_state import RowState
from executor_service.sampler import SampledTokens
from executor_service.signals import Signals
from executor_service.step_output import DeviceStepOutput, HostStepOutput, StepOutput
from executor_service.step_report import StepReport
from executor_service.warmup import LargestStep, warm_up
from executor_service.weights import load_model
from executor_service.wire import Capacity
from kernels.linear import QuantizationError, check_quantization
from kernels.paged_attention.backends import BackendError, default_block_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What settings and checkpoint amount to, before any memory is taken."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    block_size: int
    max_model_len: int
    max_rows: int

    @property
    def blocks_per_row(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)


def serve(settings: ExecutorSettings, signals: Signals | None = None) -> Stop:
    """Load the model, dial the scheduler, follow its plans; returns why it stopped.

    With ``signals`` the process hands its work over before it ends on one.

    Raises:
        ConfigError: the settings, or the checkpoint they name, cannot be served.
    """
    inbox = Inbox()
    try:
        keys = None
        if settings.curve_key is not None and settings.scheduler_key is not None:
            keys = load_keys(settings.curve_key, settings.scheduler_key)
        link = Link(settings.scheduler, settings.identity, secrets.randbits(64), inbox, keys)
    except EndpointError as error:
        raise ConfigError(f"--scheduler: {error}") from error
    except KeyFileError as error:
        raise ConfigError(f"--curve-key, --scheduler-key: {error}") from error
    metrics = ExecutorMetrics()
    try:
        if settings.metrics_port:
            serve_metrics(metrics, settings.metrics_host, settings.metrics_port)
        launcher, capacity, kv_bytes, graphs = prepare(settings)
        metered = MeteredLink(link, metrics)
        completer: Completer = InlineCompleter(metered) if capacity.device == "cpu" else ThreadCompleter(metered)
        link.start(capacity)
        if signals is not None:
            signals.drain_first(link.drain, settings.drain_grace)
        metrics.describe(capacity, kv_bytes, graphs)
        metrics.follow(lambda: link.session.is_connected, lambda: dict(link.session.dropped))
        return Executor(inbox, metered, MeteredLauncher(launcher, metrics), completer).run()
    finally:
        link.close()


def prepare(settings: ExecutorSettings) -> tuple[StepLauncher, Capacity, int, CaptureReport | None]:
    """The loaded model behind a launcher, what to report of it, the bytes of its KV cache, and its graphs if any."""
    began = time.monotonic()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        shape = _shape(settings, load_config(settings.model))
        check_quantization(settings.quantization, shape.device, shape.dtype)
        model = load_model(settings.model, shape.device, shape.dtype)
        fingerprint = model_fingerprint(settings.model, settings.quantization)
    except (UnsupportedCheckpointError, OSError) as error:
        raise ConfigError(f"--model: {error}") from error
    except QuantizationError as error:
        raise ConfigError(f"--quantization: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"--model: the weights do not fit: {error}") from error
    limits = PlanLimits(shape.max_rows, settings.max_batched_tokens, shape.max_model_len, shape.config.vocab_size)
    try:
        rows = RowState(shape.max_rows, shape.max_model_len, limits.vocab_size, shape.device)
        runner, kv_cache = _build_runner(settings, shape, limits, model, rows)
    except BackendError as error:
        raise ConfigError(f"--attention-backend: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"--max-batched-tokens, --max-rows: the largest step does not fit: {error}") from error
    grammars = GrammarRows(GrammarCompiler(settings.model, limits.vocab_size), limits.vocab_size)
    launcher = _build_launcher(shape, limits, runner, rows, kv_cache.num_blocks, grammars)
    warm_up(launcher, shape.block_size)
    graphs = None
    if shape.device.type == "cuda":
        try:
            if settings.cuda_graphs and runner.is_capturable:
                sizes = graph_sizes(limits.max_batched_tokens, limits.max_rows)
                graphs = runner.capture(sizes, shape.blocks_per_row, CudaCapturer(shape.device))
            _prove_memory(LargestStep(limits, shape.block_size), launcher, kv_cache.num_blocks)
        except torch.OutOfMemoryError as error:
            problem = f"{kv_cache.num_blocks} KV blocks leave too little memory for graphs and the largest step"
            raise ConfigError(f"{problem}: {error}") from error
    logger.info(
        "ready in %.1f s: %s on %s, %s, %d blocks of %d tokens",
        time.monotonic() - began,
        settings.model,
        shape.device,
        shape.dtype,
        kv_cache.num_blocks,
        shape.block_size,
    )
    capacity = Capacity(
        executor_id=settings.identity,
        model=settings.model.resolve().name,
        model_fingerprint=fingerprint,
        kernel_fingerprint=kernel_fingerprint(shape.device, shape.dtype, shape.block_size, runner.attention),
        device=shape.device.type,
        dtype=str(shape.dtype).removeprefix("torch."),
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        block_size=shape.block_size,
        num_blocks=kv_cache.num_blocks,
        max_rows=limits.max_rows,
        max_batched_tokens=limits.max_batched_tokens,
        features=_features(shape.device, settings.exact),
    )
    per_block = KVCache.bytes_per_block(shape.config, shape.block_size, shape.dtype)
    return launcher, capacity, per_block * (kv_cache.num_blocks + 1), graphs  # one more is the dummy block


def _features(device: torch.device, exact: bool) -> tuple[str, ...]:
    """``exact``: a row's tokens depend on nothing but its own log, so that streams go on here bit by bit."""
    return ("exact",) if device.type == "cpu" or exact else ()


def _shape(settings: ExecutorSettings, config: ModelConfig) -> _Shape:
    longest = config.max_position_embeddings
    max_model_len = settings.max_model_len or longest
    if max_model_len > longest:
        raise ConfigError(f"--max-model-len: {max_model_len} is more than the {longest} positions of the checkpoint")
    return _Shape(
        config=config,
        device=_device(settings.device),
        dtype=config.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype),
        block_size=settings.block_size or default_block_size(settings.attention_backend),
        max_model_len=max_model_len,
        max_rows=min(settings.max_rows, settings.max_batched_tokens),  # every running row must fit into a step
    )


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("--device: there is no CUDA device")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def _prove_memory(step: LargestStep, launcher: StepLauncher, num_blocks: int) -> None:
    """No request shall be the first to find that memory is short, or to wait for torch to take it from the device."""
    if step.num_blocks <= num_blocks:  # else such a step cannot occur
        step.run(launcher)


def _build_runner(
    settings: ExecutorSettings, shape: _Shape, limits: PlanLimits, model: CausalLM, rows: RowState
) -> tuple[ModelRunner, KVCache]:
    """On a CUDA device the largest step runs once, in a cache of its own: what it takes is not given to the cache."""
    if shape.device.type != "cuda":
        kv_cache = _allocate_kv_cache(settings, shape, 0)
        runner = ModelRunner(model, kv_cache, settings.attention_backend, settings.exact, settings.quantization)
        if runner.is_recordable:
            try:
                runner.record_steps(limits.max_batched_tokens, limits.max_rows, shape.blocks_per_row)
            except MemoryError as error:
                problem = "--max-batched-tokens, --max-rows: the largest step does not fit beside weights and KV cache"
                raise ConfigError(f"{problem}: {error}") from error
        return runner, kv_cache
    step = LargestStep(limits, shape.block_size)
    trial = KVCache.allocate(shape.config, step.num_blocks, shape.block_size, shape.device, shape.dtype)
    runner = ModelRunner(model, trial, settings.attention_backend, settings.exact)
    launcher = _build_launcher(shape, limits, runner, rows, step.num_blocks)
    working_bytes = peak_bytes(shape.device, lambda: step.run(launcher))
    logger.info("the largest step takes %.1f MiB besides weights and KV cache", working_bytes / (1 << 20))
    runner.use_cache(KVCache.allocate(shape.config, 1, shape.block_size, shape.device, shape.dtype))
    del trial  # its memory is free before the rest is measured
    kv_cache = _allocate_kv_cache(settings, shape, working_bytes)
    runner.use_cache(kv_cache)
    return runner, kv_cache


def _allocate_kv_cache(settings: ExecutorSettings, shape: _Shape, working_bytes: int) -> KVCache:
    """As many blocks as were asked for or as fit into what the weights left, but no more than could ever be used.

    RAM that somebody asked for is taken at once: if it is not there, that shows now and not in the middle of streams.
    """
    num_blocks = settings.num_blocks
    per_block = KVCache.bytes_per_block(shape.config, shape.block_size, shape.dtype)
    if num_blocks is None:
        if settings.kv_memory is None:
            memory = default_kv_bytes(shape.device, working_bytes)
        else:
            memory = int(settings.kv_memory)
        fitting = memory // per_block - 1  # one more is the dummy block
        if fitting < 1:
            raise ConfigError(f"--kv-memory: {memory} bytes do not hold two blocks of {per_block} bytes")
        num_blocks = min(fitting, shape.max_rows * shape.blocks_per_row)
    is_reserved = shape.device.type == "cpu" and (settings.num_blocks is not None or settings.kv_memory is not None)
    problem = f"{num_blocks} KV blocks do not fit into the memory of {shape.device}"
    if is_reserved and num_blocks * per_block > available_ram():
        raise ConfigError(problem)
    try:
        kv_cache = KVCache.allocate(shape.config, num_blocks, shape.block_size, shape.device, shape.dtype)
    except (MemoryError, RuntimeError) as error:  # the latter is torch's, for want of memory
        raise ConfigError(problem) from error
    if is_reserved:
        kv_cache.touch()
    return kv_cache


def _build_launcher(
    shape: _Shape,
    limits: PlanLimits,
    runner: ModelRunner,
    rows: RowState,
    num_blocks: int,
    masks: MaskSource | None = None,
) -> StepLauncher:
    tables = BlockTables(shape.max_rows, shape.blocks_per_row, num_blocks, shape.block_size)
    rounder = token_rounder(shape.device, shape.dtype, torch.get_num_threads())
    start_copy: Callable[[SampledTokens, StepReport], StepOutput] = HostStepOutput
    if shape.device.type == "cuda":
        side_stream = torch.cuda.Stream(shape.device)  # type: ignore[no-untyped-call]
        start_copy = partial(DeviceStepOutput, copy_stream=side_stream)
    return StepLauncher(
        rows,
        PlanApplier(limits, rows, tables),
        BatchBuilder(rows, tables, shape.device, rounder),
        runner,
        start_copy,
        masks,
    )
