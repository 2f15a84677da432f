"""Attention metadata of one step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor_service.input_batch import InputBatch
from executor_service.metadata.step_buffers import StepInputs
from kernels.paged_attention import AttentionPlan, DeviceLengths, plan_attention


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where this step's keys and values are written, and how its queries read the cache."""

    slot_mapping: Tensor  # int64 [T]
    plan: AttentionPlan


@dataclass(frozen=True, slots=True)
class OutputRows:
    """The tokens whose hidden states a step wants: S of T."""

    indices: Tensor  # int64 [S]
    plan: AttentionPlan | None  # of their queries alone, each a request of its own; None: there is only that of all


def output_rows(batch: InputBatch, indices: Tensor, block_size: int, group_size: int) -> OutputRows:
    """``indices`` of ``batch``'s tokens, int64 [S], with a plan where the host knows them.

    On a GPU it does not, and one layer's attention is not worth to send them: prompts are short work there. Nor is a
    plan of their own worth it where every token is wanted.
    """
    if not indices.is_cpu or indices.shape == batch.input_ids.shape:
        return OutputRows(indices, None)
    chosen = indices.numpy()
    requests = np.searchsorted(batch.host_query_start_loc, chosen, side="right") - 1
    starts = np.arange(chosen.size + 1, dtype=np.int32)
    lengths = (batch.positions.numpy()[chosen] + 1).astype(np.int32)
    tables = torch.from_numpy(batch.block_tables.numpy()[requests])
    return OutputRows(indices, plan_attention(starts, lengths, tables, block_size, group_size))


def attention_metadata_of(inputs: StepInputs, block_size: int, group_size: int) -> AttentionMetadata:
    """Attention over the static buffers: whatever they hold when kernels run."""
    plan = plan_attention(
        inputs.host_query_start_loc,
        inputs.host_seq_lens,
        inputs.block_tables,
        block_size,
        group_size,
        inputs.lengths,
    )
    return AttentionMetadata(slot_mapping=inputs.slot_mapping, plan=plan)


def build_attention_metadata(batch: InputBatch, block_size: int, group_size: int) -> AttentionMetadata:
    """Plan attention for ``batch``, once for all layers, without waiting for the device.

    ``group_size`` is the number of query heads per key-value head.
    """
    plan = plan_attention(
        batch.host_query_start_loc,
        batch.host_seq_lens,
        batch.block_tables,
        block_size,
        group_size,
        None if batch.seq_lens.is_cpu else _device_lengths(batch),
    )
    return AttentionMetadata(slot_mapping=batch.slot_mapping, plan=plan)


def _device_lengths(batch: InputBatch) -> DeviceLengths:
    """Of what is on the device already: nothing more is uploaded."""
    return DeviceLengths(
        query_start_loc=batch.query_start_loc,
        key_start_loc=torch.nn.functional.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        seq_lens=batch.seq_lens,
        max_query_len=int(np.diff(batch.host_query_start_loc).max(initial=0)),
        max_seq_len=int(batch.host_seq_lens.max(initial=0)),
    )
