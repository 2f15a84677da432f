"""The inference context exists during one step only."""

import numpy as np
import pytest
import torch

from executor_service.context import InferenceContext, get_context, inference_context
from executor_service.layers.attention import Attention
from executor_service.metadata.attention import AttentionMetadata
from kernels.paged_attention import plan_attention


@pytest.fixture
def context() -> InferenceContext:
    table = torch.zeros(1, 1, dtype=torch.int32)
    plan = plan_attention(np.array([0, 1], np.int32), np.array([1], np.int32), table, 16, 1)
    return InferenceContext(AttentionMetadata(torch.zeros(1, dtype=torch.int64), plan))


def test_set_for_the_block_only(context: InferenceContext) -> None:
    with pytest.raises(RuntimeError, match="no inference context"):
        get_context()
    with pytest.raises(KeyError), inference_context(context):
        assert get_context() is context
        raise KeyError
    with pytest.raises(RuntimeError, match="no inference context"):
        get_context()


def test_nesting_is_an_error(context: InferenceContext) -> None:
    with inference_context(context):
        with pytest.raises(RuntimeError, match="do not nest"), inference_context(context):
            pass
        assert get_context() is context


def test_attention_needs_a_cache(context: InferenceContext) -> None:
    query = torch.zeros(1, 1, 8)
    with inference_context(context), pytest.raises(RuntimeError, match="before a KV cache was bound"):
        Attention(8)(query, query, query)
