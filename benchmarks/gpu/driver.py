"""An executor's launcher driven by plans made here: a model with random weights, no checkpoint, no scheduler.

Rows keep their blocks for life. What a step computes is the caller's choice, which is what checks of bits and
measurements of single steps need; whole systems are measured through a scheduler instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from baton.checkpoints.shapes import CheckpointShape
from executor_service.batch_builder import BatchBuilder
from executor_service.batch_dimensions import token_rounder
from executor_service.block_tables import BlockTables
from executor_service.cuda_graphs import CaptureReport, CudaCapturer, EagerCapturer, graph_sizes
from executor_service.executor import StepLauncher
from executor_service.kv_cache import KVCache
from executor_service.model_runner import ModelRunner
from executor_service.models import CausalLM
from executor_service.models.config import parse_config
from executor_service.plan_applier import PlanApplier, PlanLimits
from executor_service.row_state import RowState
from executor_service.sampler import SampledTokens
from executor_service.step_output import DeviceStepOutput, HostStepOutput, StepOutput
from executor_service.step_plan import EXPLICIT, SAMPLE, Admission, RowSampling, StepPlan
from executor_service.step_report import StepReport


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """What the model runs on, and within which limits."""

    device: torch.device
    dtype: torch.dtype
    max_rows: int
    max_tokens: int  # in a step
    max_len: int
    block_size: int = 16
    num_blocks: int | None = None  # None: enough for all rows at full length
    exact: bool = False


@dataclass(slots=True, eq=False)
class Row:
    """A request: its tokens as far as they are known here, and how many have been computed."""

    index: int
    tokens: list[int]
    computed: int = 0
    sampling: RowSampling = field(default_factory=RowSampling)
    is_new: bool = True


def random_model(shape: CheckpointShape, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """A model of ``shape`` with random weights made on the device; the same for every call on one kind of device."""
    name = str(dtype).removeprefix("torch.")
    model = CausalLM(parse_config(shape.config(name)), device, dtype)  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0, 0.05, generator=generator)
        else:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


class Driver:
    """Rows of requests, and steps over any of them."""

    def __init__(self, model: CausalLM, options: DriverOptions) -> None:
        self.options = options
        config, device, size = model.config, options.device, options.block_size
        self._width = -(-options.max_len // size)
        num_blocks = options.num_blocks or options.max_rows * self._width
        cache = KVCache.allocate(config, num_blocks, size, device, options.dtype)
        self.runner = ModelRunner(model, cache, exact=options.exact)
        rows = RowState(options.max_rows, options.max_len, config.vocab_size, device)
        self._tables, self._mirror = (BlockTables(options.max_rows, self._width, num_blocks, size) for _ in range(2))
        self.limits = PlanLimits(options.max_rows, options.max_tokens, options.max_len, config.vocab_size)
        self._applier = PlanApplier(self.limits, rows, self._tables)
        rounder = token_rounder(device, options.dtype, torch.get_num_threads())
        self._builder = BatchBuilder(rows, self._tables, device, rounder)
        start_copy: Callable[[SampledTokens, StepReport], StepOutput] = HostStepOutput
        if device.type == "cuda":
            start_copy = partial(DeviceStepOutput, copy_stream=torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        self.launcher = StepLauncher(rows, self._applier, self._builder, self.runner, start_copy)
        self._free = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
        self._blocks: dict[int, np.ndarray] = {}
        self._rows: list[int] = list(range(options.max_rows))
        self._released: list[int] = []
        self._steps = 0

    def capture(self) -> CaptureReport:
        """Run small steps in graphs from now on; on a CPU, in the eager stand-in."""
        device = self.options.device
        capturer = CudaCapturer(device) if device.type == "cuda" else EagerCapturer()
        sizes = graph_sizes(self.options.max_tokens, self.options.max_rows)
        return self.runner.capture(sizes, self._width, capturer)

    def admit(self, tokens: Sequence[int], max_tokens: int = 0, sampling: RowSampling | None = None) -> Row:
        """A row for ``tokens`` and as many more."""
        count = -(-(len(tokens) + max_tokens) // self.options.block_size)
        if count > self._free.size or not self._rows:
            raise RuntimeError("no blocks or rows left")
        row = Row(self._rows.pop(), list(tokens), sampling=sampling or RowSampling())
        self._blocks[row.index], self._free = self._free[:count], self._free[count:]
        return row

    def release(self, row: Row) -> None:
        """Its blocks may serve others; the next step says so."""
        self._free = np.concatenate([self._free, self._blocks.pop(row.index)])
        self._rows.append(row.index)
        if not row.is_new:
            self._released.append(row.index)

    def launch(self, parts: Sequence[tuple[Row, int]]) -> StepOutput:
        """Compute and sample: the next ``count`` tokens of each row; past its known tokens, its last sampled one."""
        return self.launcher.launch(self.plan(parts))

    @torch.inference_mode()
    def logits(self, parts: Sequence[tuple[Row, int]]) -> list[Tensor]:
        """float32 [vocabulary] of the last token of each part."""
        plan = self.plan(parts)
        step = self._builder.build(plan, self._applier.apply(plan))
        rows = self.runner.compute_logits(step.batch)
        order = {row.index: place for place, row in enumerate(self._ordered(parts))}
        return [rows[order[row.index]] for row, _ in parts]

    @staticmethod
    def _ordered(parts: Sequence[tuple[Row, int]]) -> list[Row]:
        return [row for row, _ in sorted(parts, key=lambda part: part[0].computed < len(part[0].tokens))]

    def plan(self, parts: Sequence[tuple[Row, int]]) -> StepPlan:
        """The plan of such a step, after all plans made before. Rows whose input is the device's last token come
        first.
        """
        counts_of = {row.index: count for row, count in parts}
        rows = self._ordered(parts)
        released, self._released = self._released, []
        self._mirror.clear(np.array(released, np.int32))
        admissions = []
        for row in rows:
            if row.is_new:
                blocks = self._blocks[row.index]
                self._mirror.append(np.full(blocks.size, row.index, np.int32), blocks)
                log = np.array(row.tokens if row.sampling.has_penalties else [], np.int32)
                admissions.append(Admission(row.index, blocks, row.sampling, len(row.tokens), log))
        flags, ids, starts = [], [], []
        for row in rows:
            explicit = row.computed < len(row.tokens)
            flags.append(SAMPLE | (EXPLICIT if explicit else 0))
            starts.append(row.computed)
            if explicit:
                ids += row.tokens[row.computed : row.computed + counts_of[row.index]]
            row.computed += counts_of[row.index]
            row.is_new = False
        index = np.array([row.index for row in rows], np.int32)
        counts = np.array([counts_of[row.index] for row in rows], np.int32)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = np.repeat(np.array(starts), counts) + offsets
        none = np.zeros(0, np.int32)
        self._steps += 1
        return StepPlan(
            step_id=self._steps,
            released_rows=np.array(released, np.int32),
            admissions=tuple(admissions),
            extend_rows=none,
            extend_blocks=none,
            rows=index,
            num_tokens=counts,
            start_positions=np.array(starts, np.int32),
            flags=np.array(flags, np.uint8),
            prefill_token_ids=np.array(ids, np.int32),
            slot_mapping=self._mirror.slots(np.repeat(index, counts), positions).astype(np.int32),
            table_hashes=self._mirror.hashes(index),
        )
