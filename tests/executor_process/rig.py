"""An executor's state without link or model, driven by plans from the wire."""

import numpy as np
import torch

from baton_protos import execution_pb2 as pb
from executor_service import wire
from executor_service.batch_builder import BatchBuilder
from executor_service.block_tables import BlockTables
from executor_service.plan_applier import PlanApplier, PlanLimits
from executor_service.row_state import RowState
from executor_service.step_plan import StepPlan

CPU = torch.device("cpu")


class Rig:
    """Small state: 4 rows, 9 blocks of 4 tokens, sequences up to 30 tokens, a vocabulary of 100."""

    def __init__(self, token_rounder: int = 1) -> None:
        self.rows = RowState(4, 30, 100, CPU)
        self.tables = BlockTables(max_rows=4, max_blocks_per_row=8, num_blocks=9, block_size=4)
        self.applier = PlanApplier(PlanLimits(4, 16, 30, 100), self.rows, self.tables)
        self.builder = BatchBuilder(self.rows, self.tables, CPU, token_rounder)


def decoded(plan: pb.StepPlan) -> StepPlan:
    body = wire.decode(pb.Envelope(version=1, plan=plan).SerializeToString()).body
    assert isinstance(body, StepPlan)
    return body


def changed(plan: pb.StepPlan, column: str, index: int, value: int, dtype: str = "<i4") -> pb.StepPlan:
    """``plan`` with one element of a column replaced."""
    values = np.frombuffer(getattr(plan, column), dtype).copy()
    values[index] = value
    setattr(plan, column, values.tobytes())
    return plan
