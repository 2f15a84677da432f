"""Log probabilities on their way through the core: which token's they are, and each of them once."""

import numpy as np
import pytest

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.inflight import ResultMismatchError
from scheduler_service.core.invariants import check_integrity
from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.outputs import Outputs, merge
from scheduler_service.core.request import SamplingParams
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.step_plan import RowPromptLogprobs, StepResult
from tests.core.builders import capacity, request, schedule
from tests.fakes.shadow_executor import Logprob, columns_of, entries_of

WITH = SamplingParams(num_logprobs=2)
ENTRIES = [Logprob(-float(i), i, tuple((i * 10 + j, -float(j)) for j in range(i % 3))) for i in range(6)]


def of_prompt(row: int, start: int, count: int) -> RowPromptLogprobs:
    return RowPromptLogprobs(row, start, columns_of([Logprob(-float(start + i), 1, ()) for i in range(count)]))


def test_columns_can_be_taken_apart() -> None:
    columns = columns_of(ENTRIES)
    assert entries_of(columns) == ENTRIES
    assert entries_of(columns.take(np.array([5, 0, 2]))) == [ENTRIES[5], ENTRIES[0], ENTRIES[2]]
    assert columns.is_consistent
    assert not LogprobColumns(
        *(getattr(columns, name) for name in LogprobColumns.__slots__[:4]), np.zeros(1)
    ).is_consistent


def test_tokens_keep_their_log_probabilities_whoever_fails_or_leaves() -> None:
    scheduler = Scheduler(capacity(), run_ahead=2)
    leaving = request(3, [30], sampling=WITH)
    for one in (request(0, [1]), request(1, [10], sampling=WITH), request(2, [20], sampling=WITH), leaving):
        scheduler.add_request(one)
    plan = schedule(scheduler)
    scheduler.vacate_rows(lambda one: one is leaving)
    status = np.array([0, 1, 0, 0], np.uint8)  # the first of those with log probabilities fails
    result = StepResult(plan.step_id, np.array([5, 6, 7, 8], np.int32), status, logprobs=columns_of(ENTRIES[:3]))
    outputs = scheduler.settle(result)
    assert outputs.handles.tolist() == [0, 2, 3]
    assert outputs.logprob_indices.tolist() == [1, 2]
    assert outputs.logprobs is not None and entries_of(outputs.logprobs) == ENTRIES[1:3]
    check_integrity(scheduler)


def test_outputs_are_merged_and_split_with_their_log_probabilities() -> None:
    def outputs(handles: list[int], indices: list[int], entries: list[Logprob]) -> Outputs:
        columns = columns_of(entries) if entries else None
        tokens = np.array(handles, np.int32)
        return Outputs(np.array(handles, np.int64), tokens, [], np.array(indices, np.intp), columns)

    merged = merge([outputs([1, 2], [1], ENTRIES[:1]), outputs([3], [], []), outputs([4, 5], [0, 1], ENTRIES[1:3])])
    assert merged.logprob_indices.tolist() == [1, 3, 4]
    part = merged.part(lambda handles: handles % 2 == 1)
    assert part.handles.tolist() == [1, 3, 5]
    assert part.logprob_indices.tolist() == [2]
    assert part.logprobs is not None and entries_of(part.logprobs) == [ENTRIES[2]]


def test_missing_log_probabilities_are_a_mismatch() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1], sampling=WITH))
    plan = schedule(scheduler)
    for wrong in (None, columns_of(ENTRIES[:2])):
        with pytest.raises(ResultMismatchError):
            scheduler.settle(StepResult(plan.step_id, np.array([5], np.int32), logprobs=wrong))
    check_integrity(scheduler)


def test_a_prompts_positions_come_once_although_they_are_computed_again() -> None:
    scheduler = Scheduler(capacity(max_batched_tokens=4), run_ahead=1)
    sampling = SamplingParams(num_prompt_logprobs=0, needs_log=True)
    one = request(0, list(range(1, 11)), max_tokens=2, sampling=sampling)
    scheduler.add_request(one)
    plan = schedule(scheduler)
    assert plan.admissions[0].token_ids.tolist() == list(range(1, 11))
    no_tokens = np.zeros(0, np.int32)
    first = scheduler.settle(StepResult(plan.step_id, no_tokens, prompt_logprobs=(of_prompt(plan.rows[0], 1, 4),)))
    assert [(item.start_position, len(item.logprobs)) for item in first.prompt_logprobs] == [(1, 4)]
    scheduler.vacate_rows(lambda _: True)
    again = schedule(scheduler)
    assert again.start_positions.tolist() == [0]  # its own blocks are cached, and of no use
    outputs = scheduler.settle(StepResult(again.step_id, no_tokens, prompt_logprobs=(of_prompt(again.rows[0], 1, 4),)))
    assert outputs.prompt_logprobs == []
    third = schedule(scheduler)
    outputs = scheduler.settle(StepResult(third.step_id, no_tokens, prompt_logprobs=(of_prompt(third.rows[0], 5, 4),)))
    assert [(item.start_position, len(item.logprobs)) for item in outputs.prompt_logprobs] == [(5, 4)]
    check_integrity(scheduler)


def test_a_gap_in_a_prompts_log_probabilities_is_a_mismatch() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1, 2, 3], sampling=SamplingParams(num_prompt_logprobs=0, needs_log=True)))
    scheduler.add_request(request(1, [4]))
    plan = schedule(scheduler)
    asking, other = plan.rows.tolist()
    for wrong in (of_prompt(asking, 2, 1), of_prompt(asking, 1, 3), of_prompt(other, 1, 1), of_prompt(7, 1, 1)):
        with pytest.raises(ResultMismatchError):
            scheduler.settle(StepResult(plan.step_id, np.array([5, 6], np.int32), prompt_logprobs=(wrong,)))
    check_integrity(scheduler)


def test_a_complete_grammar_ends_the_request() -> None:
    scheduler = Scheduler(capacity(), run_ahead=1)
    scheduler.add_request(request(0, [1], sampling=SamplingParams(needs_log=True)))
    scheduler.add_request(request(1, [2]))
    plan = schedule(scheduler)
    ended = np.array([1, 0], np.uint8)
    outputs = scheduler.settle(StepResult(plan.step_id, np.array([5, 6], np.int32), grammar_ended=ended))
    assert [(end.handle, end.reason.name, end.stop_token_id) for end in outputs.finished] == [(0, "STOP", 5)]


def test_a_prompts_log_probabilities_find_their_request_after_its_row_has_changed_hands() -> None:
    scheduler = Scheduler(capacity(max_rows=1, max_batched_tokens=8), run_ahead=2)
    sampling = SamplingParams(num_prompt_logprobs=0, needs_log=True)
    leaving = request(0, list(range(1, 13)), sampling=sampling)
    scheduler.add_request(leaving)
    plan = schedule(scheduler)
    scheduler.vacate_rows(lambda _: True)
    scheduler.set_held(leaving, True)
    scheduler.add_request(request(1, [50, 51, 52], sampling=sampling))
    assert schedule(scheduler).rows.tolist() == plan.rows.tolist()
    result = StepResult(plan.step_id, np.zeros(0, np.int32), prompt_logprobs=(of_prompt(plan.rows[0], 1, 8),))
    outputs = scheduler.settle(result)
    assert [(item.handle, len(item.logprobs)) for item in outputs.prompt_logprobs] == [(0, 8)]
    check_integrity(scheduler)


def test_only_what_is_new_of_a_larger_portion_is_delivered() -> None:
    cluster = Cluster(10, run_ahead=1)
    cluster.executor_ready("a", capacity(max_batched_tokens=8), 0.0)
    sampling = SamplingParams(num_prompt_logprobs=0, needs_log=True)
    cluster.add_request(0, np.arange(1, 13, dtype=np.int32), 4, sampling, 0.0)
    delivered = []
    for name, tokens, count in (("a", [], 8), ("b", [5], 11)):
        plan = cluster.schedule(name, 0.0)
        assert plan is not None
        prompt = (of_prompt(plan.rows[0], 1, count),)
        outputs = cluster.settle(name, StepResult(plan.step_id, np.array(tokens, np.int32), prompt_logprobs=prompt))
        delivered += [value for item in outputs.prompt_logprobs for value in item.logprobs.logprobs.tolist()]
        if name == "a":
            cluster.executor_lost("a", 0.0)
            cluster.executor_ready("b", capacity(), 0.0)
    assert delivered == [-float(position) for position in range(1, 12)]


@pytest.mark.parametrize("by_grammar", [False, True])
def test_a_request_ends_although_it_has_left_its_row(by_grammar: bool) -> None:
    scheduler = Scheduler(capacity(), run_ahead=2)
    stops = () if by_grammar else (5,)
    scheduler.add_request(request(0, [1], sampling=SamplingParams(stop_token_ids=stops)))
    plan = schedule(scheduler)
    scheduler.vacate_rows(lambda _: True)
    ended = np.array([1], np.uint8) if by_grammar else np.zeros(0, np.uint8)
    outputs = scheduler.settle(StepResult(plan.step_id, np.array([5], np.int32), grammar_ended=ended))
    assert outputs.token_ids.tolist() == [5]
    assert [(end.reason.name, end.stop_token_id) for end in outputs.finished] == [("STOP", 5)]
    assert scheduler.num_waiting == 0 and scheduler.schedule(0.0) is None
    check_integrity(scheduler)


def test_a_stop_id_that_comes_too_early_ends_nothing_for_a_request_that_has_left_its_row() -> None:
    scheduler = Scheduler(capacity(), run_ahead=2)
    scheduler.add_request(request(0, [1], sampling=SamplingParams(stop_token_ids=(5,), min_tokens=1)))
    plan = schedule(scheduler)
    scheduler.vacate_rows(lambda _: True)
    assert scheduler.settle(StepResult(plan.step_id, np.array([5], np.int32))).finished == []
