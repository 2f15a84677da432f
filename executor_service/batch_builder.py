"""From a plan and the state of its rows to the tensors a step runs on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.batch_dimensions import BatchDimensions, pad_tokens
from executor_service.block_tables import BlockTables
from executor_service.input_batch import InputBatch, SamplingBatch
from executor_service.plan_applier import StepLayout
from executor_service.row_state import RowState
from executor_service.step_plan import StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class BuiltStep:
    """A step's input, and the rows (int64 [S], on the device) whose ``last_token`` its sampled tokens become."""

    batch: InputBatch
    sampled_rows: Tensor


class BatchBuilder:
    """Builds ``InputBatch``es; host arrays go to the device without waiting for it."""

    def __init__(self, rows: RowState, tables: BlockTables, device: torch.device, token_rounder: int) -> None:
        self._rows = rows
        self._tables = tables
        self._device = device
        self._token_rounder = token_rounder

    def build(self, plan: StepPlan, layout: StepLayout) -> BuiltStep:
        """The input of a plan that has been applied; ``layout`` is what applying it returned."""
        num_tokens = layout.positions.size
        num_rows = plan.rows.size
        padded = pad_tokens(num_tokens, self._token_rounder)
        width = -(-int(layout.ends.max()) // self._tables.block_size)
        sampled_rows = plan.rows[layout.sampling].astype(np.int64)
        batch = InputBatch(
            dimensions=BatchDimensions(num_tokens, num_rows - layout.num_decodes, layout.num_decodes),
            input_ids=self._input_ids(plan, layout.num_decodes, padded),
            positions=self._upload(_pad(layout.positions, padded)),
            slot_mapping=self._upload(self._pad_slots(layout.slot_mapping, padded)),
            query_start_loc=self._upload(layout.query_start_loc),
            seq_lens=self._upload(layout.ends),
            block_tables=self._upload(self._tables.gather(plan.rows, width)),
            sample_indices=self._upload(layout.query_start_loc[1:][layout.sampling].astype(np.int64) - 1),
            sampling=self._sampling(sampled_rows, layout.ends[layout.sampling].astype(np.int64)),
            host_query_start_loc=layout.query_start_loc,
            host_seq_lens=layout.ends,
        )
        return BuiltStep(batch, self._upload(sampled_rows))

    def _input_ids(self, plan: StepPlan, num_decodes: int, padded: int) -> Tensor:
        host = np.zeros(padded, np.int64)
        host[num_decodes : num_decodes + plan.prefill_token_ids.size] = plan.prefill_token_ids
        input_ids = self._upload(host)
        if num_decodes:
            decodes = self._upload(plan.rows[:num_decodes].astype(np.int64))
            torch.index_select(self._rows.last_token, 0, decodes, out=input_ids[:num_decodes])
        return input_ids

    def _pad_slots(self, slots: NDArray[np.int64], padded: int) -> NDArray[np.int64]:
        """Padding goes to the dummy block, spread over it so that no slot of a real block is ever named."""
        count = padded - slots.size
        first = self._tables.dummy_block * self._tables.block_size
        return np.concatenate([slots, first + np.arange(count) % self._tables.block_size])

    def _sampling(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> SamplingBatch:
        state = self._rows
        temperature, top_k, top_p = state.temperature[rows], state.top_k[rows], state.top_p[rows]
        return SamplingBatch(
            temperature=self._upload(temperature),
            top_k=self._upload(top_k),
            top_p=self._upload(top_p),
            seed=self._upload(state.seed[rows]),
            position=self._upload(positions),
            all_greedy=bool((temperature == 0).all()),
            any_top_k=bool((top_k > 0).any()),
            any_top_p=bool((top_p < 1).any()),
        )

    def _upload(self, array: NDArray[Any]) -> Tensor:
        """``array`` on the device. It must not change afterwards: on a CPU the tensor shares its memory."""
        host = torch.from_numpy(array)
        if self._device.type == "cpu":
            return host
        # fresh pinned memory per copy: the caching host allocator reuses it only after the copy has run
        return host.pin_memory().to(self._device, non_blocking=True)


def _pad(array: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    padded = np.zeros(length, np.int64)
    padded[: array.size] = array
    return padded
