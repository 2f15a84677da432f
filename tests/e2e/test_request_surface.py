"""What a request may ask for, through real processes: a few of everything."""

import time
from collections.abc import Iterator

import grpc
import pytest

from baton import Client, Completion, FinishReason, LocalCluster
from baton_protos import generation_pb2 as pb
from baton_protos.generation_pb2_grpc import GenerationStub
from tests.e2e.corpus import CorpusRequest
from tests.e2e.harness import eventually, is_idle

PROMPT = "def read(path):"


@pytest.fixture
def whole(client: Client) -> Completion:
    return client.generate(PROMPT, seed=11, max_tokens=64, ignore_eos=True)


def test_parallel_samples_are_requests_of_their_own(client: Client, whole: Completion) -> None:
    completion = client.generate(PROMPT, seed=11, max_tokens=64, ignore_eos=True, n=4)
    assert completion.token_ids == whole.token_ids and completion.seed == 11
    assert len({sample.token_ids for sample in completion.samples}) == 4
    for sample in completion.samples:
        alone = client.generate(PROMPT, seed=sample.seed, max_tokens=64, ignore_eos=True)
        assert (alone.token_ids, alone.text) == (sample.token_ids, sample.text)
    assert completion.usage.completion_tokens == 4 * 64
    assert completion.usage.prompt_tokens == len(completion.prompt_token_ids)


def test_parallel_samples_share_the_prompt(client: Client, requests: tuple[CorpusRequest, ...]) -> None:
    prompt = [7, *list(range(100, 400))]
    completion = client.generate(prompt, seed=3, max_tokens=4, ignore_eos=True, n=3)
    assert completion.usage.cached_tokens == 0  # what the first one computes is not cached yet
    assert client.generate(prompt, seed=3, max_tokens=4, ignore_eos=True, n=3).usage.cached_tokens > 200
    salted = client.generate(prompt, seed=3, max_tokens=4, ignore_eos=True, cache_salt="mine")
    assert salted.usage.cached_tokens == 0 and salted.token_ids == completion.token_ids


@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_strings(client: Client, whole: Completion, include_stop: bool) -> None:
    for begin in range(5, len(whole.text) - 8, 11):
        stop = whole.text[begin : begin + 4]
        at = whole.text.index(stop)
        options = {"seed": 11, "max_tokens": 64, "ignore_eos": True, "stop": stop, "include_stop": include_stop}
        with client.stream(PROMPT, **options) as stream:  # type: ignore[arg-type]
            shown = "".join(delta.text for delta in stream)
        completion = stream.completion
        assert shown == completion.text == whole.text[: at + (len(stop) if include_stop else 0)]
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
        assert (completion.finish_reason, completion.stop_string) == (FinishReason.STOP, stop)
        assert completion.usage.completion_tokens == len(completion.token_ids) < 64
    assert eventually(lambda: is_idle(client.cluster_status()), 10.0)


def test_streamed_text_is_the_text(client: Client) -> None:
    for seed in range(8):  # a random model says random bytes
        with client.stream(PROMPT, seed=seed, max_tokens=80, ignore_eos=True, temperature=2.0) as stream:
            shown = "".join(delta.text for delta in stream)
        completion = client.submit(PROMPT, seed=seed, max_tokens=80, ignore_eos=True, temperature=2.0).result()
        assert shown == stream.completion.text == completion.text == client.detokenize(completion.token_ids)


def test_stop_token_ids_and_min_tokens(client: Client, whole: Completion) -> None:
    stop = whole.token_ids[9]
    first = whole.token_ids.index(stop)
    completion = client.generate(PROMPT, seed=11, max_tokens=64, ignore_eos=True, stop_token_ids=[stop])
    assert completion.token_ids == whole.token_ids[: first + 1]
    assert (completion.finish_reason, completion.stop_token_id) == (FinishReason.STOP, stop)
    later = client.generate(
        PROMPT, seed=11, max_tokens=64, ignore_eos=True, stop_token_ids=[stop], min_tokens=first + 1
    )
    assert len(later.token_ids) > first + 1 and stop not in later.token_ids[: first + 1]


def test_log_probabilities(client: Client) -> None:
    completion = client.generate(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=5, prompt_logprobs=0)
    assert [one.token_id for one in completion.logprobs] == list(completion.token_ids)
    assert all(one.rank == 1 and one.top[0].token_id == one.token_id for one in completion.logprobs)
    for one in completion.logprobs:
        values = [top.logprob for top in one.top]
        assert len(values) == 5 and values == sorted(values, reverse=True) and one.logprob == values[0] < 0
    assert completion.cumulative_logprob == pytest.approx(sum(one.logprob for one in completion.logprobs))
    assert [one.token_id for one in completion.prompt_logprobs] == list(completion.prompt_token_ids[1:])
    # What is generated has, as part of a prompt, the same log probabilities.
    again = client.generate(
        [*completion.prompt_token_ids, *completion.token_ids], max_tokens=1, temperature=0.0, prompt_logprobs=0
    )
    expected = [one.logprob for one in completion.logprobs]
    assert [one.logprob for one in again.prompt_logprobs[-12:]] == pytest.approx(expected, abs=1e-4)


def test_penalties_biases_and_lists_change_what_is_sampled(client: Client, whole: Completion) -> None:
    greedy = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    plain = client.generate(PROMPT, **greedy)  # type: ignore[arg-type]
    banned = client.generate(PROMPT, banned_token_ids=[plain.token_ids[0]], **greedy)  # type: ignore[arg-type]
    assert plain.token_ids[0] not in banned.token_ids
    allowed = client.generate(PROMPT, allowed_token_ids=[50, 60, 70], **greedy)  # type: ignore[arg-type]
    assert set(allowed.token_ids) <= {50, 60, 70}
    biased = client.generate(PROMPT, logit_bias={77: 100.0}, **greedy)  # type: ignore[arg-type]
    assert set(biased.token_ids) == {77}
    varied = client.generate(PROMPT, logit_bias={77: 50.0}, presence_penalty=2.0, frequency_penalty=2.0, **greedy)  # type: ignore[arg-type]
    assert varied.token_ids[0] == 77


def test_a_deadline_ends_it_with_what_there_is(client: Client) -> None:
    completion = client.generate(PROMPT, max_tokens=1500, ignore_eos=True, deadline=time.time() + 0.5)
    assert completion.finish_reason is FinishReason.DEADLINE
    assert 0 < len(completion.token_ids) < 1500
    assert eventually(lambda: is_idle(client.cluster_status()), 10.0)


def test_timings(client: Client) -> None:
    timings = client.generate(PROMPT, max_tokens=16, ignore_eos=True, timings=True).timings
    assert timings is not None
    assert 0 < timings.first_token_us <= timings.total_us and timings.batch_tokens[-1] == 16
    assert timings.queue_us <= timings.first_token_us


@pytest.fixture
def stub(cluster: LocalCluster) -> Iterator[GenerationStub]:
    with grpc.insecure_channel(cluster.address) as channel:
        yield GenerationStub(channel)  # type: ignore[no-untyped-call]


def test_resume_at_every_token(client: Client, stub: GenerationStub, whole: Completion) -> None:
    for count in range(0, 64, 7):
        text = client.detokenize(whole.token_ids[:count]).rstrip("\ufffd")
        assert whole.text.startswith(text)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=whole.prompt_token_ids),
            sampling=pb.SamplingParams(seed=11),
            stop=pb.StopConditions(max_tokens=64, ignore_eos=True),
            resume=[pb.ResumePoint(sample=0, token_ids=whole.token_ids[:count], text_offset=len(text))],
        )
        (sample,) = stub.Generate(request).samples
        assert (*whole.token_ids[:count], *sample.token_ids) == whole.token_ids
        assert text + sample.text == whole.text


def test_priority_decides_who_waits(client: Client) -> None:
    """With room for few, whoever has a lower number is done first."""
    rows = client.cluster_status().executors[0].max_rows
    ended: list[int] = []
    crowd = [client.submit([5, 6], max_tokens=300, ignore_eos=True, priority=5) for _ in range(2 * rows)]
    crowd[-1].when_done(lambda: ended.append(1))
    urgent = client.generate([5, 6], max_tokens=4, ignore_eos=True, priority=-5)
    assert len(urgent.token_ids) == 4
    assert not ended
    for one in crowd:
        one.cancel()
    assert eventually(lambda: is_idle(client.cluster_status()), 30.0)
