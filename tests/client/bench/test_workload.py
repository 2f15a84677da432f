"""Traces and the requests that are made of them, or of distributions: functions of a seed."""

import itertools
import json

import pytest

from baton.bench.lengths import Lengths
from baton.bench.trace import BLOCK_TOKENS, TraceRequest, parse_trace
from baton.bench.workload import BenchRequest, SyntheticWorkload, TraceWorkload, Vocabulary
from baton.errors import InvalidRequestError

VOCABULARY = Vocabulary(size=1000, max_total_tokens=4096)


def lines(*objects: object) -> bytes:
    return "\n".join(json.dumps(one) for one in objects).encode()


def synthetic(prompt: str = "uniform:5-50", prefix: int = 0, seed: int = 1, limit: int = 4096) -> SyntheticWorkload:
    vocabulary = Vocabulary(1000, limit)
    return SyntheticWorkload(vocabulary, Lengths.parse(prompt), Lengths.parse("7"), prefix, seed)


def first(workload: SyntheticWorkload | TraceWorkload, count: int, run: int = 1) -> list[BenchRequest]:
    return list(itertools.islice(workload.requests(run), count))


def ids(request: BenchRequest) -> list[int]:
    assert isinstance(request.prompt, list)
    return request.prompt


def test_a_trace() -> None:
    content = lines(
        {"offset": 1.5, "prompt": "hello", "output_tokens": 4},
        {"offset": 0.5, "input_tokens": 10, "output_tokens": 3, "anything": "else"},
    )
    assert parse_trace(b"\n" + content) == [TraceRequest(0.5, "", 10, 3), TraceRequest(1.5, "hello", 0, 4)]


def test_a_mooncake_trace() -> None:
    content = lines({"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]})
    assert parse_trace(content) == [TraceRequest(27.482, "", 6955, 52, (46, 47))]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"\nnonsense", "line 2 of the trace: not JSON"),
        (b"[1]", "line 1 of the trace: not a JSON object"),
        (lines({"offset": 1}), "needs input_tokens or input_length"),
        (lines({"input_tokens": 4}), "needs output_tokens or output_length"),
        (lines({"input_tokens": 0, "output_tokens": 1}), "input_tokens: must be a whole number"),
        (lines({"input_tokens": 4, "output_tokens": 1 << 30}), "output_tokens: must be a whole number"),
        (lines({"input_tokens": True, "output_tokens": 1}), "input_tokens: must be a whole number"),
        (lines({"offset": -1, "input_tokens": 4, "output_tokens": 1}), "offset: must be a number"),
        (b'{"offset": Infinity, "input_tokens": 4, "output_tokens": 1}', "offset: must be a number"),
        (lines({"prompt": 3, "output_tokens": 1}), "prompt: must be text"),
        (lines({"input_tokens": 4, "output_tokens": 1, "hash_ids": ["a"]}), "hash_ids: must be a list"),
        (lines({"input_tokens": 4, "output_tokens": 1}, {"offset": 1, "input_tokens": 4, "output_tokens": 1}), "only"),
    ],
)
def test_what_is_no_trace(content: bytes, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        parse_trace(content)


def test_synthetic_requests_are_a_function_of_seed_and_run() -> None:
    assert first(synthetic(), 20) == first(synthetic(), 20)
    assert first(synthetic(), 20) != first(synthetic(), 20, run=2)
    assert first(synthetic(), 20) != first(synthetic(seed=2), 20)


def test_synthetic_prompts_have_their_lengths_and_the_vocabulary() -> None:
    requests = first(synthetic(), 500)
    assert {len(ids(one)) for one in requests} == set(range(5, 51))
    drawn = {token for one in requests for token in ids(one)}
    assert min(drawn) == 0 and max(drawn) == 999
    assert {one.output_tokens for one in requests} == {7}


def test_the_shared_prefix_is_the_same_in_all_runs() -> None:
    prompts = [ids(one) for run in (0, 1) for one in first(synthetic(prompt="5", prefix=30), 10, run)]
    assert {len(prompt) for prompt in prompts} == {35}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 20


def test_requests_are_cut_to_what_the_model_takes() -> None:
    (one,) = first(synthetic(prompt="5000", limit=100), 1)
    assert (len(ids(one)), one.output_tokens) == (93, 7)
    with pytest.raises(InvalidRequestError, match="leaves no room"):
        synthetic(prefix=99, limit=100)


def test_requests_of_a_trace() -> None:
    trace = [TraceRequest(2.0, "", 3, 9000), TraceRequest(2.5, "some text", 0, 5)]
    workload = TraceWorkload(VOCABULARY, trace, seed=1)
    assert workload.offsets == [0.0, 0.5]
    made_up, text = workload.requests(1)
    assert (len(ids(made_up)), made_up.output_tokens) == (1, 4095)
    assert text == BenchRequest("some text", 5)
    assert TraceWorkload(VOCABULARY, [TraceRequest(None, "a", 0, 5)], seed=1).offsets is None


def test_equal_blocks_of_a_trace_are_equal_tokens() -> None:
    size = BLOCK_TOKENS
    trace = [TraceRequest(0.0, "", 2 * size + 100, 5, (1, 2)), TraceRequest(0.0, "", size + 10, 5, (1, 9, 8))]
    one, other = (ids(request) for request in TraceWorkload(VOCABULARY, trace, seed=1).requests(1))
    assert (len(one), len(other)) == (2 * size + 100, size + 10)
    assert one[:size] == other[:size] and one[size : size + 10] != other[size:]
