"""Streams: positions are checked, what is known is dropped, holes are errors."""

import pytest

from baton import Delta, FinishReason, ProtocolError, TopToken, Usage
from baton.folding import StreamFolder
from baton_protos import generation_pb2 as pb
from tests.client.fake_server import chunk, end, start


def folded(*responses: pb.GenerateStreamResponse) -> tuple[StreamFolder, list[Delta]]:
    folder = StreamFolder()
    deltas = [folder.add(response) for response in responses]
    return folder, [delta for delta in deltas if delta is not None]


def test_a_stream_folds_into_a_completion() -> None:
    folder, deltas = folded(
        start(), chunk(0, [10], "", 0), chunk(1, [11, 12], "añ", 0), chunk(3, [], "b", 2), end(3, pb.FINISH_REASON_STOP)
    )
    assert deltas == [Delta("", (10,), 0, 0), Delta("añ", (11, 12), 1, 0), Delta("b", (), 3, 2)]
    completion = folder.finished()
    assert completion.text == "añb"
    assert completion.token_ids == (10, 11, 12)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.usage == Usage(prompt_tokens=2, cached_tokens=1, completion_tokens=3)
    assert (completion.prompt_token_ids, completion.seed, completion.request_id) == ((1, 2), 7, "r1")
    assert folder.request_id == "r1"


def test_what_came_before_is_dropped() -> None:
    first, again, overlap = chunk(0, [1, 2], "ab", 0), chunk(0, [1], "a", 0), chunk(1, [2, 3], "bc", 1)
    folder, deltas = folded(start(), first, again, first, overlap, end(3))
    assert deltas == [Delta("ab", (1, 2), 0, 0), Delta("c", (3,), 2, 2)]
    assert folder.finished().text == "abc"


def logprobs(*token_ids: int) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            token_id=one, logprob=-float(one), rank=1, top_token_ids=[one, 9], top_logprobs=[-1, -2], text=f"<{one}>"
        )
        for one in token_ids
    ]


def test_several_samples_fold_apart() -> None:
    folder, deltas = folded(
        start(sample_seeds=[7, 8]),
        chunk(0, [1], "a", 0),
        chunk(0, [5, 6], "xy", 0, sample=1),
        end(2, pb.FINISH_REASON_STOP, sample=1, stop_string="z"),
        chunk(1, [2], "b", 1),
        end(2),
    )
    assert deltas == [Delta("a", (1,), 0, 0), Delta("xy", (5, 6), 0, 0, sample=1), Delta("b", (2,), 1, 1)]
    completion = folder.finished()
    first, second = completion.samples
    assert (first.text, first.token_ids, first.seed, first.finish_reason) == ("ab", (1, 2), 7, FinishReason.LENGTH)
    assert (second.text, second.token_ids, second.seed, second.stop_string) == ("xy", (5, 6), 8, "z")
    assert (completion.text, completion.token_ids) == (first.text, first.token_ids)
    assert completion.usage == Usage(prompt_tokens=2, cached_tokens=1, completion_tokens=4)


def test_log_probabilities_fold_with_their_tokens() -> None:
    prompt = pb.GenerateStreamResponse(prompt_logprobs=pb.StreamPromptLogprobs(logprobs=logprobs(2)))
    folder, deltas = folded(
        start(),
        prompt,
        chunk(0, [1, 2], "", 0, logprobs=logprobs(1, 2)),
        chunk(1, [2, 3], "", 0, logprobs=logprobs(2, 3)),
        end(3, timings=pb.Timings(queue_us=1, first_token_us=2, total_us=3, batch_us=[2], batch_tokens=[3])),
    )
    assert [one.token_id for delta in deltas for one in delta.logprobs] == [1, 2, 3]
    completion = folder.finished()
    assert completion.cumulative_logprob == -6.0
    assert [one.token_id for one in completion.prompt_logprobs] == [2]
    assert completion.logprobs[0].top == (TopToken(1, -1.0, ""), TopToken(9, -2.0, "")) and completion.logprobs[0].text
    assert completion.timings is not None and completion.timings.batch_tokens == (3,)


@pytest.mark.parametrize(
    "responses",
    [
        pytest.param([start(), chunk(0, [1], "a", 0), chunk(2, [3], "c", 1)], id="token gap"),
        pytest.param([start(), chunk(0, [1], "a", 0), chunk(1, [2], "b", 2)], id="text gap"),
        pytest.param([start(), chunk(0, [1], "a", 0), end(2)], id="the last tokens are missing"),
        pytest.param([chunk(0, [1], "a", 0)], id="no start"),
        pytest.param([end(0)], id="no start before the end"),
        pytest.param([start(), start()], id="two starts"),
        pytest.param([start(), end(0), chunk(0, [1], "a", 0)], id="more after the end"),
        pytest.param([start(), end(0, pb.FINISH_REASON_UNSPECIFIED)], id="no finish reason"),
        pytest.param([start(), pb.GenerateStreamResponse()], id="empty message"),
        pytest.param([start(sample_seeds=[1, 2]), end(0), end(0)], id="a sample that ends twice"),
        pytest.param([start(sample_seeds=[1, 2]), end(0), chunk(0, [1], "a", 0)], id="a sample after its end"),
        pytest.param([start(), chunk(0, [1, 2], "", 0, logprobs=logprobs(1))], id="a log probability is missing"),
        pytest.param([start(), pb.GenerateStreamResponse(chunk=pb.StreamChunk(sample=1))], id="another sample"),
    ],
)
def test_what_breaks_the_protocol_is_an_error(responses: list[pb.GenerateStreamResponse]) -> None:
    with pytest.raises(ProtocolError):
        folded(*responses)


def test_a_stream_without_an_end_is_an_error() -> None:
    folder, _ = folded(start(), chunk(0, [1], "a", 0))
    assert folder.completion is None
    with pytest.raises(ProtocolError, match="without its last message"):
        folder.finished()
