"""The largest step that the limits allow is a legal plan, and as large as that."""

from pathlib import Path

import numpy as np
import pytest
import torch

from executor_service.block_tables import BlockTables
from executor_service.plan_applier import PlanApplier, PlanLimits
from executor_service.row_state import RowState
from executor_service.step_plan import RowSampling
from executor_service.warmup import LargestStep

from .builders import save_checkpoint
from .serving import BLOCK_SIZE, MAX_LEN, ROWS, Serving

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
    layout = applier.apply(step._plan(step._token_counts(), RowSampling()))
    assert layout.positions.size == expected
    assert layout.sampling.size == min(rows, expected)
    assert layout.num_decodes == 0
    assert np.unique(layout.slot_mapping).size == expected
    assert longest - block_size < layout.ends[-1] <= longest


def test_whatever_rows_can_ask_for_is_tried(tmp_path: Path) -> None:
    """Every table is in use afterwards, and no row is."""
    save_checkpoint(tmp_path, "qwen3")
    serving = Serving(tmp_path)
    LargestStep(PlanLimits(ROWS, 2 * MAX_LEN, MAX_LEN, 199), BLOCK_SIZE).run(serving._launcher)
    state = serving.rows.sampling
    tables = (state.log, state.permitted, state.stops, state.bias_ids, state.bias_values)
    assert all(table.is_allocated for table in tables)
    assert not state.any_special
    assert not serving.rows.admitted.any()
    narrow = Serving(tmp_path)
    LargestStep(PlanLimits(1, 3, 10, 199), BLOCK_SIZE).run(narrow._launcher)
