"""From a plan and the state of its rows to the tensors a step runs on."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.batch_dimensions import BatchDimensions, pad_tokens
from executor_service.block_tables import BlockTables
from executor_service.input_batch import InputBatch, LogAppend
from executor_service.masks import MaskSource, NoMasks, TokenMasks
from executor_service.plan_applier import StepLayout
from executor_service.row_state import RowState
from executor_service.sampling_builder import ComputedTokens, SamplingBuilder
from executor_service.step_plan import StepPlan
from executor_service.step_report import NO_REPORT, StepReport
from executor_service.upload import uploader_to


@dataclass(frozen=True, slots=True, eq=False)
class BuiltStep:
    """A step's input, where its sampled tokens go, and what is reported of it.

    Attributes:
        sampled_rows: int64 [S] on the device, the rows whose ``last_token`` the sampled tokens become.
        log_append: None when no sampled row keeps a log.
    """

    batch: InputBatch
    sampled_rows: Tensor
    log_append: LogAppend | None
    report: StepReport


class BatchBuilder:
    """Builds ``InputBatch``es; host arrays go to the device without waiting for it."""

    def __init__(self, rows: RowState, tables: BlockTables, device: torch.device, token_rounder: int) -> None:
        self._rows = rows
        self._tables = tables
        self._upload = uploader_to(device)
        self._token_rounder = token_rounder
        self._sampling = SamplingBuilder(rows.sampling, self._upload)

    def build(
        self, plan: StepPlan, layout: StepLayout, masks: TokenMasks | None = None, source: MaskSource | None = None
    ) -> BuiltStep:
        """The input of a plan that has been applied, which returned ``layout``; ``masks`` are its matchers, of
        ``source``, which has those of audited tokens, too.
        """
        num_tokens = layout.positions.size
        num_rows = plan.rows.size
        padded = pad_tokens(num_tokens, self._token_rounder)
        width = -(-int(layout.ends.max()) // self._tables.block_size)
        sampled_rows = plan.rows[layout.sampling].astype(np.int64)
        sampled_positions = layout.ends[layout.sampling].astype(np.int64)
        if masks is None:
            sampling, grammar = self._sampling.batch(sampled_rows, sampled_positions), None
        else:
            sampling = self._sampling.batch(sampled_rows, sampled_positions, masks.rows)
            grammar = self._sampling.grammar(masks, sampling)
        known = np.zeros(padded, np.int64)
        known[layout.num_decodes : layout.num_decodes + plan.prefill_token_ids.size] = plan.prefill_token_ids
        batch = InputBatch(
            dimensions=BatchDimensions(num_tokens, num_rows - layout.num_decodes, layout.num_decodes),
            input_ids=self._upload(known),
            positions=self._upload(_pad(layout.positions, padded)),
            slot_mapping=self._upload(self._pad_slots(layout.slot_mapping, padded)),
            query_start_loc=self._upload(layout.query_start_loc),
            seq_lens=self._upload(layout.ends),
            block_tables=self._upload(self._tables.gather(plan.rows, width)),
            sample_indices=self._upload(layout.query_start_loc[1:][layout.sampling].astype(np.int64) - 1),
            sampling=sampling,
            host_query_start_loc=layout.query_start_loc,
            host_seq_lens=layout.ends,
            grammar=grammar,
        )
        decodes = self._upload(plan.rows[: layout.num_decodes].astype(np.int64))
        step = self._with_reports(
            plan, layout, BuiltStep(batch, self._upload(sampled_rows), None, NO_REPORT), masks, source or NoMasks()
        )
        self._upload.send()
        if layout.num_decodes:
            self._rows.take_last(decodes, batch.input_ids[: layout.num_decodes])
        return step

    def _with_reports(
        self, plan: StepPlan, layout: StepLayout, step: BuiltStep, masks: TokenMasks | None, source: MaskSource
    ) -> BuiltStep:
        """``step`` with what its special rows add."""
        if not self._rows.sampling.any_special:
            return step
        sampled_rows = plan.rows[layout.sampling].astype(np.int64)
        sampled_positions = layout.ends[layout.sampling].astype(np.int64)
        tokens = ComputedTokens(np.repeat(plan.rows, plan.num_tokens).astype(np.int64), layout.positions)
        targets, parts = self._sampling.prompt_targets(tokens)
        audits, audit_rows = self._sampling.audits(tokens, source)
        self._rows.sampling.end_audits(plan.rows, layout.ends)  # decode steps are as cheap again as before
        return BuiltStep(
            batch=replace(step.batch, prompt_targets=targets, audits=audits),
            sampled_rows=step.sampled_rows,
            log_append=self._sampling.log_append(sampled_rows, sampled_positions),
            report=StepReport(self._sampling.logprob_counts(sampled_rows), parts, audit_rows, masks),
        )

    def _pad_slots(self, slots: NDArray[np.int64], padded: int) -> NDArray[np.int64]:
        """Padding goes to the dummy block, spread over it so that no slot of a real block is ever named."""
        count = padded - slots.size
        if not count:
            return slots
        first = self._tables.dummy_block * self._tables.block_size
        return np.concatenate([slots, first + np.arange(count) % self._tables.block_size])


def _pad(array: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    if array.size == length:
        return array
    padded = np.zeros(length, np.int64)
    padded[: array.size] = array
    return padded
