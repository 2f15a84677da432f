"""Attention metadata of one step."""

from dataclasses import dataclass

from torch import Tensor

from executor_service.input_batch import InputBatch
from kernels.paged_attention import AttentionPlan, plan_attention


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where this step's keys and values are written, and how its queries read the cache."""

    slot_mapping: Tensor  # int64 [T]
    plan: AttentionPlan


def build_attention_metadata(batch: InputBatch, block_size: int, group_size: int) -> AttentionMetadata:
    """Plan attention for ``batch``, once for all layers, without waiting for the device.

    ``group_size`` is the number of query heads per key-value head.
    """
    plan = plan_attention(batch.host_query_start_loc, batch.host_seq_lens, batch.block_tables, block_size, group_size)
    return AttentionMetadata(slot_mapping=batch.slot_mapping, plan=plan)
