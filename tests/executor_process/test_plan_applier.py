"""Every way a plan can contradict the executor is a fault of the right kind."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from baton_protos import execution_pb2 as pb
from executor_service.step_plan import FaultCode, PlanError
from tests.executor_process.rig import Rig, changed, decoded
from tests.executor_process.scheduler_stub import PlanMaker, int32s

GREEDY = pb.RowSampling(top_p=1.0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def maker(rig: Rig) -> PlanMaker:
    """Rows 0 and 1 have run a prefill of 5 and 3 tokens and sampled."""
    maker = PlanMaker()
    plan = maker.plan(admit={0: ([2, 5], GREEDY), 1: ([7], GREEDY)}, prefill={0: [1, 2, 3, 4, 5], 1: [6, 7, 8]})
    rig.applier.apply(decoded(plan))
    return maker


def assert_fault(rig: Rig, plan: pb.StepPlan, code: FaultCode, match: str) -> None:
    with pytest.raises(PlanError, match=match) as raised:
        rig.applier.apply(decoded(plan))
    assert raised.value.code is code


def assert_bad(rig: Rig, plan: pb.StepPlan, match: str) -> None:
    assert_fault(rig, plan, FaultCode.BAD_PLAN, match)


def test_good_plans_move_the_cursors(rig: Rig, maker: PlanMaker) -> None:
    layout = rig.applier.apply(decoded(maker.plan(extend=[(1, 8)], decode=[1, 0], prefill={})))
    assert layout.positions.tolist() == [3, 5]
    assert rig.rows.cursor.tolist() == [6, 4, -1, -1]
    rig.applier.apply(decoded(maker.plan(decode=[0, 1])))
    assert rig.rows.cursor.tolist() == [7, 5, -1, -1]


def test_layout_of_decodes_is_the_one_that_the_long_way_finds(rig: Rig, maker: PlanMaker, monkeypatch: Any) -> None:
    rig.applier.apply(decoded(maker.plan(extend=[(1, 8)], decode=[1, 0])))
    short = rig.applier.apply(plan := decoded(maker.plan(decode=[1, 0])))
    rig.rows.cursor[plan.rows] = plan.start_positions
    monkeypatch.setattr(rig.applier, "_lay_out_decodes", lambda _: None)
    long = rig.applier.apply(plan)
    for name in ("num_decodes", "query_start_loc", "ends", "positions", "slot_mapping", "sampling"):
        one, other = np.asarray(getattr(short, name)), np.asarray(getattr(long, name))
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


def test_row_and_blocks_can_be_reused_in_the_plan_that_releases_them(rig: Rig, maker: PlanMaker) -> None:
    plan = maker.plan(release=[0], admit={0: ([5, 2], GREEDY)}, decode=[1], prefill={0: [9]})
    rig.applier.apply(decoded(plan))
    assert rig.rows.cursor.tolist() == [1, 4, -1, -1]


def test_prefix_hit_starts_past_zero(rig: Rig, maker: PlanMaker) -> None:
    maker.cursors[2] = 4
    rig.applier.apply(decoded(maker.plan(admit={2: ([2, 8], GREEDY)}, prefill={2: [9, 9]})))
    assert rig.rows.cursor[2] == 6


def test_admitted_row_may_be_scheduled_by_a_later_plan(rig: Rig, maker: PlanMaker) -> None:
    rig.applier.apply(decoded(maker.plan(admit={2: ([8], GREEDY)}, decode=[1])))
    rig.applier.apply(decoded(maker.plan(prefill={2: [9]})))
    assert rig.rows.cursor[2] == 1


def test_plan_that_only_releases(rig: Rig, maker: PlanMaker) -> None:
    layout = rig.applier.apply(decoded(maker.plan(release=[0, 1])))
    assert layout.positions.size == layout.sampling.size == 0
    assert not rig.rows.admitted.any()


def test_chunked_prefill_samples_only_at_its_end(rig: Rig) -> None:
    maker = PlanMaker()
    rig.applier.apply(decoded(maker.plan(admit={0: ([2, 5], GREEDY)}, prefill={0: [1, 2, 3]}, sample=False)))
    assert not rig.rows.has_sampled[0]
    assert rig.applier.apply(decoded(maker.plan(prefill={0: [4, 5]}))).ends.tolist() == [5]
    assert rig.rows.has_sampled[0]


def test_greedy_rows_drop_their_filters(rig: Rig) -> None:
    sampling = pb.RowSampling(temperature=0, top_k=5, top_p=0.5, seed=2**64 - 1)
    rig.applier.apply(decoded(PlanMaker().plan(admit={3: ([0], sampling)}, prefill={3: [1]})))
    assert (rig.rows.sampling.top_k[3], rig.rows.sampling.top_p[3], rig.rows.sampling.seed[3]) == (0, 1.0, -1)


def test_top_k_beyond_the_vocabulary_is_off(rig: Rig) -> None:
    sampling = pb.RowSampling(temperature=1, top_k=2**32 - 1, top_p=1)
    rig.applier.apply(decoded(PlanMaker().plan(admit={3: ([0], sampling)}, prefill={3: [1]})))
    assert rig.rows.sampling.top_k[3] >= 100


def test_released_row_is_free(rig: Rig, maker: PlanMaker) -> None:
    plan = maker.plan(decode=[1])
    plan.released_rows = int32s([3])
    assert_bad(rig, plan, "row 3 is released but holds no request")


@pytest.mark.parametrize("row", [-1, 4])
def test_released_row_out_of_range(rig: Rig, maker: PlanMaker, row: int) -> None:
    plan = maker.plan(decode=[1])
    plan.released_rows = int32s([row])
    assert_bad(rig, plan, "outside")


@pytest.mark.parametrize("row", [0, 4, 2**32 - 1])
def test_admitted_row_taken_or_out_of_range(rig: Rig, maker: PlanMaker, row: int) -> None:
    plan = maker.plan(decode=[1])
    plan.admissions.add(row=row, block_ids=int32s([3]), sampling=GREEDY)
    assert_bad(rig, plan, "out of range or taken")


@pytest.mark.parametrize(
    "sampling",
    [
        pb.RowSampling(temperature=math.nan, top_p=1),
        pb.RowSampling(temperature=-1, top_p=1),
        pb.RowSampling(temperature=math.inf, top_p=1),
        pb.RowSampling(temperature=1, top_p=0),
        pb.RowSampling(temperature=1, top_p=math.nan),
        pb.RowSampling(temperature=1, top_p=1.5),
    ],
)
def test_sampling_parameters_out_of_range(rig: Rig, sampling: pb.RowSampling) -> None:
    assert_bad(rig, PlanMaker().plan(admit={0: ([1], sampling)}, prefill={0: [1]}), "has t")


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("sampling", "match"),
    [
        (pb.RowSampling(top_p=1, min_p=math.nan), "min_p"),
        (pb.RowSampling(top_p=1, min_p=-0.1), "min_p"),
        (pb.RowSampling(top_p=1, min_p=1.5), "min_p"),
        (pb.RowSampling(top_p=1, repetition_penalty=-1), "repetition penalty"),
        (pb.RowSampling(top_p=1, repetition_penalty=math.inf), "repetition penalty"),
        (pb.RowSampling(top_p=1, repetition_penalty=math.nan), "repetition penalty"),
        (pb.RowSampling(top_p=1, frequency_penalty=2.5), "frequency penalty"),
        (pb.RowSampling(top_p=1, presence_penalty=math.nan), "presence penalty"),
        (pb.RowSampling(top_p=1, num_logprobs=21), "21 log probabilities"),
        (pb.RowSampling(top_p=1, num_prompt_logprobs=2**32 - 1), "log probabilities"),
        (pb.RowSampling(top_p=1, bias_token_ids=int32s([1]), bias_values=floats(1, 2)), "2 biases for 1"),
        (pb.RowSampling(top_p=1, bias_token_ids=int32s([1, 1]), bias_values=floats(1, 2)), "two biases"),
        (pb.RowSampling(top_p=1, bias_token_ids=int32s([1]), bias_values=floats(math.nan)), "out of bounds"),
        (pb.RowSampling(top_p=1, bias_token_ids=int32s([1]), bias_values=floats(-101)), "out of bounds"),
        (pb.RowSampling(top_p=1, bias_token_ids=int32s([100]), bias_values=floats(1)), "biased id"),
        (pb.RowSampling(top_p=1, bias_token_ids=int32s([-1]), bias_values=floats(1)), "biased id"),
        (pb.RowSampling(top_p=1, allowed_token_ids=int32s([0, 100])), "allowed id"),
        (pb.RowSampling(top_p=1, allowed_token_ids=int32s([0] * 101)), "101 allowed ids"),
        (pb.RowSampling(top_p=1, banned_token_ids=int32s([-1])), "banned id"),
        (pb.RowSampling(top_p=1, stop_token_ids=int32s([2**31 - 1])), "stop id"),
        (pb.RowSampling(top_p=1, grammar="x" * ((1 << 20) + 1)), "a grammar of"),
    ],
)
def test_processors_out_of_range(rig: Rig, sampling: pb.RowSampling, match: str) -> None:
    assert_bad(rig, PlanMaker().plan(admit={0: ([1], sampling)}, prefill={0: [1]}), match)


def with_log(plan: pb.StepPlan, token_ids: list[int], prompt_len: int, audit_from: int = 0) -> pb.StepPlan:
    (admission,) = plan.admissions
    admission.token_ids, admission.prompt_len, admission.audit_from = int32s(token_ids), prompt_len, audit_from
    return plan


PENALISED = pb.RowSampling(top_p=1, presence_penalty=1)


@pytest.mark.parametrize(
    ("token_ids", "prompt_len", "audit_from", "match"),
    [
        ([1, 2, 100], 3, 0, "a token of its log"),
        ([1, -2, 3], 3, 0, "a token of its log"),
        ([1, 2, 3], 4, 0, "a prompt of 4 tokens in a log of 3"),
        ([1, 2, 3], 0, 0, "a prompt of 0 tokens"),
        ([1] * 31, 3, 0, "a log of 31 tokens"),
        ([1, 2, 3], 2**32 - 1, 0, "a log of 3 tokens and a prompt"),
        ([], 0, 0, "no token log"),
        ([1, 2, 3], 2, 1, "an audit from 1"),
        ([1, 2, 3], 2, 4, "an audit from 4"),
    ],
)
def test_logs_that_make_no_sense(rig: Rig, token_ids: list[int], prompt_len: int, audit_from: int, match: str) -> None:
    plan = PlanMaker().plan(admit={0: ([1], PENALISED)}, prefill={0: [1, 2, 3]})
    assert_bad(rig, with_log(plan, token_ids, prompt_len, audit_from), match)


@pytest.mark.parametrize("sampling", [pb.RowSampling(top_p=1, num_prompt_logprobs=0), pb.RowSampling(top_p=1)])
def test_prompt_logprobs_and_audits_need_the_log(rig: Rig, sampling: pb.RowSampling) -> None:
    plan = PlanMaker().plan(admit={0: ([1], sampling)}, prefill={0: [1, 2, 3]})
    assert_bad(rig, with_log(plan, [], 0, 0 if sampling.HasField("num_prompt_logprobs") else 2), "no token log")


def test_rows_with_penalties_sample_on_their_whole_log(rig: Rig) -> None:
    maker = PlanMaker()
    plan = maker.plan(admit={0: ([1, 2], PENALISED)}, prefill={0: [1, 2, 3, 4]})
    assert_bad(rig, with_log(plan, [1, 2, 3], 3), "past the end of its token log")


def test_rows_with_penalties_append_to_their_log(rig: Rig) -> None:
    maker = PlanMaker()
    plan = with_log(maker.plan(admit={0: ([1, 2], PENALISED)}, prefill={0: [1, 2, 3]}), [1, 2, 3], 3)
    rig.applier.apply(decoded(plan))
    rig.applier.apply(decoded(maker.plan(decode=[0])))
    assert rig.rows.sampling.log_len[0] == 5


@pytest.mark.parametrize("block", [-1, 9])
def test_admitted_block_out_of_range(rig: Rig, maker: PlanMaker, block: int) -> None:
    assert_bad(rig, maker.plan(admit={2: ([block], GREEDY)}, prefill={2: [1]}), "block id")


def test_extended_row_is_free(rig: Rig, maker: PlanMaker) -> None:
    plan = maker.plan(decode=[1])
    plan.extend_rows, plan.extend_blocks = int32s([2]), int32s([1])
    assert_bad(rig, plan, "row 2 is extended")


def test_extension_columns_differ_in_length(rig: Rig, maker: PlanMaker) -> None:
    plan = maker.plan(decode=[1])
    plan.extend_rows = int32s([1])
    assert_bad(rig, plan, "1 rows to extend with 0 blocks")


def test_table_outgrows_the_longest_sequence(rig: Rig, maker: PlanMaker) -> None:
    assert_bad(rig, maker.plan(extend=[(1, 3)] * 8, decode=[1]), "outgrow")


@pytest.mark.parametrize("row", [-1, 2, 4])
def test_scheduled_row_unknown(rig: Rig, maker: PlanMaker, row: int) -> None:
    assert_bad(rig, changed(maker.plan(decode=[1]), "rows", 0, row), "scheduled")


def test_row_scheduled_twice(rig: Rig, maker: PlanMaker) -> None:
    plan = maker.plan(extend=[(1, 3)], decode=[0, 1])
    assert_bad(rig, changed(plan, "rows", 1, 0), "twice")


@pytest.mark.parametrize("column", ["num_tokens", "start_positions", "flags", "table_hashes"])
def test_columns_differ_in_length(rig: Rig, maker: PlanMaker, column: str) -> None:
    plan = maker.plan(decode=[1])
    setattr(plan, column, b"")
    assert_bad(rig, plan, "differ in length|hashes for")


def test_unknown_flags(rig: Rig, maker: PlanMaker) -> None:
    assert_bad(rig, changed(maker.plan(decode=[1]), "flags", 0, 5, "u1"), "unknown flags")


def test_decodes_come_first(rig: Rig, maker: PlanMaker) -> None:
    plan = maker.plan(decode=[0], prefill={1: [3]})
    plan.flags = bytes(reversed(plan.flags))
    assert_bad(rig, plan, "must come first")


def test_decode_of_several_tokens(rig: Rig, maker: PlanMaker) -> None:
    assert_bad(rig, changed(maker.plan(decode=[1]), "num_tokens", 0, 2), "more than one token")


def test_decode_of_a_row_that_has_not_sampled(rig: Rig) -> None:
    maker = PlanMaker()
    rig.applier.apply(decoded(maker.plan(admit={0: ([2], GREEDY)}, prefill={0: [1]}, sample=False)))
    assert_bad(rig, maker.plan(decode=[0]), "has not sampled")


@pytest.mark.parametrize("count", [0, -1])
def test_row_without_tokens(rig: Rig, maker: PlanMaker, count: int) -> None:
    assert_bad(rig, changed(maker.plan(prefill={1: [3]}), "num_tokens", 0, count), "no tokens")


def test_token_budget(rig: Rig) -> None:
    plan = PlanMaker().plan(admit={0: ([0, 1, 2, 3, 4], GREEDY)}, prefill={0: [1] * 17})
    assert_bad(rig, plan, "17 tokens in a step")


@pytest.mark.parametrize("start", [-1, 0, 2, 4, 2**31 - 1])
def test_start_differs_from_the_cursor(rig: Rig, maker: PlanMaker, start: int) -> None:
    assert_bad(rig, changed(maker.plan(decode=[1]), "start_positions", 0, start), "does not start where it stopped")


@pytest.mark.parametrize("start", [-4, 2])
def test_first_start_inside_a_block(rig: Rig, maker: PlanMaker, start: int) -> None:
    plan = maker.plan(admit={2: ([8, 1], GREEDY)}, prefill={2: [1]})
    assert_bad(rig, changed(plan, "start_positions", 0, start), "does not start where it stopped")


def test_tokens_reach_past_the_table(rig: Rig, maker: PlanMaker) -> None:
    rig.applier.apply(decoded(maker.plan(decode=[1])))
    plan = maker.plan(prefill={0: [1]})
    del plan.admissions[:]
    maker.cursors[0] -= 1
    assert_bad(rig, changed(plan, "num_tokens", 0, 4), "past its block table")


def test_tokens_reach_past_the_longest_sequence(rig: Rig) -> None:
    maker = PlanMaker()
    maker.cursors[0] = 28
    assert_bad(rig, maker.plan(admit={0: (list(range(8)), GREEDY)}, prefill={0: [1] * 3}), "longest sequence")


def test_hash_differs(rig: Rig, maker: PlanMaker) -> None:
    plan = changed(maker.plan(decode=[1]), "table_hashes", 0, 1, "<u4")
    assert_fault(rig, plan, FaultCode.MISMATCH, "hash")


def test_slot_mapping_differs(rig: Rig, maker: PlanMaker) -> None:
    plan = changed(maker.plan(decode=[1]), "slot_mapping", 0, 1)
    assert_fault(rig, plan, FaultCode.MISMATCH, "slot mapping")


def test_slot_mapping_of_another_length(rig: Rig, maker: PlanMaker) -> None:
    plan = maker.plan(decode=[1])
    plan.slot_mapping += plan.slot_mapping
    assert_fault(rig, plan, FaultCode.MISMATCH, "slot mapping")


@pytest.mark.parametrize("token", [-1, 100])
def test_token_outside_the_vocabulary(rig: Rig, maker: PlanMaker, token: int) -> None:
    assert_bad(rig, maker.plan(prefill={1: [token]}), "vocabulary")


@pytest.mark.parametrize("spoil", [lambda ids: b"", lambda ids: ids + ids])
def test_wrong_number_of_input_tokens(rig: Rig, maker: PlanMaker, spoil: Callable[[bytes], bytes]) -> None:
    plan = maker.plan(prefill={1: [3]})
    plan.prefill_token_ids = spoil(plan.prefill_token_ids)
    assert_bad(rig, plan, "input tokens for")


def test_reset_forgets(rig: Rig, maker: PlanMaker) -> None:
    rig.applier.reset()
    assert not rig.rows.admitted.any()
    assert not rig.tables.lengths(np.arange(4, dtype=np.int32)).any()
    assert_bad(rig, maker.plan(decode=[1]), "holds no request")
