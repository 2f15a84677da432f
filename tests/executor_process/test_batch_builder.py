"""The worked example of the seeds' bookkeeping (block size 4, dummy block 9), and padding."""

import numpy as np
import pytest
import torch

from baton_protos import execution_pb2 as pb
from executor_service.batch_builder import BuiltStep
from executor_service.step_report import NO_REPORT
from tests.executor_process.rig import Rig, decoded
from tests.executor_process.scheduler_stub import PlanMaker

GREEDY = pb.RowSampling(top_p=1.0)
DRAWN = pb.RowSampling(temperature=0.5, top_k=7, top_p=0.9, seed=2**63 + 1)
A, B, C = 0, 1, 2


def worked_example(rig: Rig) -> BuiltStep:
    """A and B decode at positions 5 and 8, C runs a prompt of 6; B has just got its third block."""
    maker = PlanMaker()
    prefill = {A: [1, 2, 3, 4, 5], B: [11, 12, 13, 14, 15, 16, 17, 18]}
    rig.applier.apply(decoded(maker.plan(admit={A: ([2, 5], GREEDY), B: ([0, 7], DRAWN)}, prefill=prefill)))
    rig.rows.last_token[torch.tensor([A, B])] = torch.tensor([6, 19])
    plan = maker.plan(
        extend=[(B, 3)], admit={C: ([1, 6], GREEDY)}, decode=[A, B], prefill={C: [21, 22, 23, 24, 25, 26]}
    )
    step = decoded(plan)
    return rig.builder.build(step, rig.applier.apply(step))


def test_parameters_of_a_row_that_changed_hands() -> None:
    rig, maker = Rig(), PlanMaker()

    def sampled(plan: pb.StepPlan) -> list[list[float]]:
        step = decoded(plan)
        sampling = rig.builder.build(step, rig.applier.apply(step)).batch.sampling
        return [sampling.temperature.tolist(), sampling.top_k.tolist(), sampling.position.tolist()]

    assert sampled(maker.plan(admit={A: ([2], DRAWN)}, prefill={A: [1, 2]})) == [[0.5], [7], [2]]
    assert sampled(maker.plan(decode=[A])) == [[0.5], [7], [3]]
    assert sampled(maker.plan(release=[A], admit={A: ([5], GREEDY)}, prefill={A: [1]})) == [[0.0], [0], [1]]


def test_worked_example() -> None:
    step = worked_example(Rig())
    batch = step.batch
    assert batch.input_ids.tolist() == [6, 19, 21, 22, 23, 24, 25, 26]
    assert batch.positions.tolist() == [5, 8, 0, 1, 2, 3, 4, 5]
    assert batch.slot_mapping.tolist() == [21, 12, 4, 5, 6, 7, 24, 25]
    assert batch.query_start_loc.tolist() == batch.host_query_start_loc.tolist() == [0, 1, 2, 8]
    assert batch.seq_lens.tolist() == batch.host_seq_lens.tolist() == [6, 9, 6]
    assert batch.block_tables.tolist() == [[2, 5, 9], [0, 7, 3], [1, 6, 9]]
    assert batch.sample_indices.tolist() == [0, 1, 7]
    dimensions = batch.dimensions
    assert (dimensions.tokens, dimensions.prefill_requests, dimensions.decode_requests) == (8, 1, 2)
    assert step.sampled_rows.tolist() == [A, B, C]


def test_sampling_parameters_follow_the_rows() -> None:
    sampling = worked_example(Rig()).batch.sampling
    assert sampling.temperature.tolist() == [0, 0.5, 0]
    assert sampling.top_k.tolist() == [0, 7, 0]
    assert sampling.top_p.tolist() == pytest.approx([1, 0.9, 1])
    assert sampling.seed.tolist() == [0, 2**63 + 1 - 2**64, 0]
    assert sampling.position.tolist() == [6, 9, 6]  # the index each new token will have
    assert (sampling.all_greedy, sampling.any_top_k, sampling.any_top_p) == (False, True, True)


def test_types() -> None:
    batch = worked_example(Rig()).batch
    for tensor in (batch.input_ids, batch.positions, batch.slot_mapping, batch.sample_indices):
        assert tensor.dtype == torch.int64
    for tensor in (batch.query_start_loc, batch.seq_lens, batch.block_tables, batch.sampling.top_k):
        assert tensor.dtype == torch.int32
    assert batch.sampling.seed.dtype == batch.sampling.position.dtype == torch.int64
    assert batch.sampling.temperature.dtype == batch.sampling.top_p.dtype == torch.float32


def test_padding_goes_to_the_dummy_block() -> None:
    batch = worked_example(Rig(token_rounder=16)).batch
    assert batch.dimensions.tokens == 8
    assert batch.input_ids.tolist()[8:] == [0] * 8
    assert batch.positions.tolist()[8:] == [0] * 8
    assert {slot // 4 for slot in batch.slot_mapping.tolist()[8:]} == {9}
    assert batch.query_start_loc.tolist() == [0, 1, 2, 8]


def test_all_greedy_decode_and_rows_that_do_not_sample() -> None:
    rig, maker = Rig(), PlanMaker()
    first = decoded(maker.plan(admit={3: ([4], GREEDY)}, prefill={3: [1, 2]}, sample=False))
    batch = rig.builder.build(first, rig.applier.apply(first)).batch
    assert batch.sample_indices.size(0) == batch.sampling.temperature.size(0) == 0
    assert batch.sampling.all_greedy
    second = decoded(maker.plan(prefill={3: [3]}))
    step = rig.builder.build(second, rig.applier.apply(second))
    assert step.batch.sampling.all_greedy
    assert not step.batch.sampling.any_top_k
    assert not step.batch.sampling.any_top_p
    assert step.batch.block_tables.tolist() == [[4]]
    assert step.sampled_rows.tolist() == [3]


def test_uploads_do_not_alias_the_state() -> None:
    rig = Rig()
    batch = worked_example(rig).batch
    rig.applier.reset()
    assert batch.block_tables.tolist() == [[2, 5, 9], [0, 7, 3], [1, 6, 9]]
    assert np.array_equal(batch.host_seq_lens, [6, 9, 6])


def test_rows_without_features_ask_for_nothing() -> None:
    step = worked_example(Rig())
    sampling, batch = step.batch.sampling, step.batch
    assert sampling.min_p is sampling.mask is sampling.bias is sampling.penalties is sampling.logprobs is None
    assert batch.grammar is batch.prompt_targets is None
    assert batch.audits == ()
    assert step.log_append is None
    assert step.report is NO_REPORT
