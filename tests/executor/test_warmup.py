"""The largest step that the limits allow is a legal plan, and as large as that."""

import numpy as np
import pytest
import torch

from executor_service.block_tables import BlockTables
from executor_service.plan_applier import PlanApplier, PlanLimits
from executor_service.row_state import RowState
from executor_service.warmup import LargestStep

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "tokens", "longest", "block_size", "expected"),
    [
        (4, 64, 100, 16, 64),
        (4, 63, 100, 16, 63),
        (4, 3, 100, 16, 3),  # fewer tokens than rows
        (2, 64, 20, 16, 40),  # no row is longer than the longest sequence
        (1, 8, 8, 1, 8),
    ],
)
def test_the_largest_step(rows: int, tokens: int, longest: int, block_size: int, expected: int) -> None:
    limits = PlanLimits(rows, tokens, longest, vocab_size=10)
    step = LargestStep(limits, block_size)
    tables = BlockTables(rows, -(-longest // block_size), step.num_blocks, block_size)
    applier = PlanApplier(limits, RowState(rows, longest, 10, CPU), tables)
    layout = applier.apply(step._plan())
    assert layout.positions.size == expected
    assert layout.sampling.size == min(rows, expected)
    assert layout.num_decodes == 0
    assert np.unique(layout.slot_mapping).size == expected
