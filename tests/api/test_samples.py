"""Parallel samples, stop strings, log probabilities and timings, against a fake engine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from baton_protos import engine_pb2
from baton_protos import generation_pb2 as pb
from scheduler_service.api.checkpoint import load_checkpoint
from scheduler_service.api.seeds import sample_seed
from scheduler_service.api.tokenizer import ModelTokenizer

from .conftest import until
from .fake_engine import CACHED_TOKENS, QUEUE_US, FakeEngine, logprob_of, token_of, top_ids_of
from .reading import ask, read

TEXT = "the quick brown fox jumps 🙂 over größer dogs 日本語 and on"


@pytest.fixture
def tokenizer(checkpoint: Path) -> ModelTokenizer:
    loaded = load_checkpoint(checkpoint).tokenizer
    assert loaded is not None
    return loaded


@pytest.fixture
def says(engine: FakeEngine, tokenizer: ModelTokenizer) -> Any:
    """Have the engine generate the tokens of a text, and of another one after it."""

    def say(text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        engine.token = lambda submit, index: ids[index] if index < len(ids) else 40
        return ids

    return say


async def test_samples_are_streams_of_their_own(engine: FakeEngine, stub: Any, tokenizer: ModelTokenizer) -> None:
    stream = await read(stub.GenerateStream(ask(n=5)))
    seeds = [sample_seed(7, index) for index in range(5)]
    assert list(stream.start.sample_seeds) == seeds and stream.start.seed == seeds[0] == 7
    assert stream.start.scheduler_id == "test-scheduler"
    assert [submit.sampling.seed for submit in engine.submits] == seeds
    for submit, sample in zip(engine.submits, stream.samples, strict=True):
        assert sample.token_ids == [token_of(submit, index) for index in range(20)]
        assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert sample.ended.usage.completion_tokens == 20
    response = await stub.Generate(ask(n=5))
    assert [(one.index, list(one.token_ids), one.text, one.seed) for one in response.samples] == [
        (index, sample.token_ids, sample.text, seed)
        for index, (sample, seed) in enumerate(zip(stream.samples, seeds, strict=True))
    ]
    prompt = stream.start.prompt_tokens
    assert response.usage == pb.Usage(prompt_tokens=prompt, cached_tokens=CACHED_TOKENS, completion_tokens=100)


def test_sample_seeds_are_splitmix() -> None:
    # SplitMix64's published first outputs from 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [sample_seed(1234567, index) for index in range(4)] == [1234567, *published]
    assert sample_seed(2**64 - 1, 1) < 2**64


async def test_samples_end_on_their_own(engine: FakeEngine, stub: Any) -> None:
    ends = {sample_seed(7, index): 3 * index for index in range(4)}
    engine.token = lambda submit, index: 11 if index == ends[submit.sampling.seed] else 40
    stream = await read(stub.GenerateStream(ask(n=4, stop={"stop_token_ids": [11]})))
    assert [len(sample.token_ids) for sample in stream.samples] == [1, 4, 7, 10]
    assert [sample.ended.stop_token_id for sample in stream.samples] == [11] * 4


async def test_all_samples_of_a_cancelled_request_are_aborted(engine: FakeEngine, stub: Any) -> None:
    call = stub.GenerateStream(ask(n=3, max_tokens=900))
    await call.read()
    await call.read()
    call.cancel()
    await until(lambda: sorted(engine.aborted) == [submit.handle for submit in engine.submits])
    assert len(engine.aborted) == 3


async def test_a_failing_sample_fails_the_request(engine: FakeEngine, stub: Any) -> None:
    engine.verdict = engine_pb2.FinishedRequest(outcome=engine_pb2.OUTCOME_ERROR, message="bad logits")
    with pytest.raises(Exception, match="bad logits"):
        await stub.Generate(ask(n=2))


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("stop", ["the", "fox", " 🙂 ", "größer d", "語", "n", "and on", "s 🙂 over größer dogs 日"])
async def test_a_stop_string_ends_text_tokens_and_usage(
    engine: FakeEngine, stub: Any, says: Any, tokenizer: ModelTokenizer, stop: str, include_stop: bool
) -> None:
    ids = says(TEXT)
    request = ask(max_tokens=500, stop={"stop_strings": ["nowhere", stop], "include_stop": include_stop})
    sample = (await read(stub.GenerateStream(request))).only
    end = TEXT.index(stop) + (len(stop) if include_stop else 0)
    completing = next(
        count for count in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:count], skip_special_tokens=True)
    )
    assert (sample.text, sample.token_ids) == (TEXT[:end], ids[:completing])
    assert sample.ended.finish_reason == pb.FINISH_REASON_STOP
    assert (sample.ended.stop_string, sample.ended.WhichOneof("matched_stop")) == (stop, "stop_string")
    assert sample.ended.usage.completion_tokens == completing
    assert sample.ended.usage.cached_tokens == CACHED_TOKENS
    assert engine.aborted == [engine.submits[0].handle]
    response = await stub.Generate(request)
    (one,) = response.samples
    assert (one.text, list(one.token_ids), one.stop_string) == (sample.text, sample.token_ids, stop)
    assert response.usage == sample.ended.usage


async def test_what_might_have_become_a_stop_string_is_sent_at_the_end(stub: Any, says: Any) -> None:
    ids = says(TEXT)
    request = ask(max_tokens=len(ids), stop={"stop_strings": ["and only"]})
    sample = (await read(stub.GenerateStream(request))).only
    assert sample.text == TEXT and sample.ended.finish_reason == pb.FINISH_REASON_LENGTH
    assert sample.ended.WhichOneof("matched_stop") is None


async def test_a_stop_string_ends_one_sample_of_several(engine: FakeEngine, stub: Any, says: Any) -> None:
    says(TEXT)
    said = engine.token
    engine.token = lambda submit, index: said(submit, index) if submit.sampling.seed == 7 else 40
    stream = await read(stub.GenerateStream(ask(n=2, max_tokens=100, stop={"stop_strings": ["fox"]})))
    assert stream.samples[0].text == "the quick brown " and len(stream.samples[1].token_ids) == 100
    assert [sample.ended.finish_reason for sample in stream.samples] == [
        pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_LENGTH,
    ]


async def test_stop_strings_work_without_text(stub: Any, says: Any) -> None:
    ids = says(TEXT)
    request = ask(max_tokens=500, stop={"stop_strings": ["fox"]}, output=pb.OutputOptions(text=False))
    sample = (await read(stub.GenerateStream(request))).only
    assert sample.text == "" and 0 < len(sample.token_ids) < len(ids) and sample.ended.stop_string == "fox"


async def test_min_tokens_hold_off_every_stop(engine: FakeEngine, stub: Any, says: Any) -> None:
    ids = says("a fox, a fox, a fox")
    stop = {"stop_strings": ["fox"], "stop_token_ids": [ids[0]], "min_tokens": len(ids) // 2}
    sample = (await read(stub.GenerateStream(ask(max_tokens=100, stop=stop)))).only
    assert len(sample.token_ids) > len(ids) // 2
    assert sample.text.count("fox") >= 1 and sample.ended.finish_reason == pb.FINISH_REASON_STOP
    assert engine.submits[0].sampling.min_tokens == len(ids) // 2


async def test_every_end_of_sequence_id_ends_a_request(engine: FakeEngine, stub: Any) -> None:
    for token_id in (2, 0):  # generation_config.json has two
        engine.token = lambda submit, index, end=token_id: end if index == 5 else 40
        (sample,) = (await stub.Generate(ask(stop={"ignore_eos": False}))).samples
        assert (len(sample.token_ids), sample.stop_token_id) == (6, token_id)
        assert sample.finish_reason == pb.FINISH_REASON_STOP
    (sample,) = (await stub.Generate(ask())).samples
    assert len(sample.token_ids) == 20


async def test_log_probabilities(stub: Any, tokenizer: ModelTokenizer) -> None:
    request = ask(output=pb.OutputOptions(logprobs=3, prompt_logprobs=2))
    stream = await read(stub.GenerateStream(request))
    sample = stream.only
    assert [one.token_id for one in sample.logprobs] == sample.token_ids
    for one in sample.logprobs:
        assert one.logprob == pytest.approx(logprob_of(one.token_id)) and one.rank == 1 + one.token_id % 7
        assert list(one.top_token_ids) == top_ids_of(one.token_id, 3)
        assert one.text == tokenizer.token_text(one.token_id)
        assert list(one.top_texts) == [tokenizer.token_text(top) for top in one.top_token_ids]
    total = sum(logprob_of(token_id) for token_id in sample.token_ids)
    assert sample.ended.cumulative_logprob == pytest.approx(total)
    assert [one.token_id for one in stream.prompt_logprobs] == list(stream.start.prompt_token_ids)[1:]
    assert [list(one.top_token_ids) for one in stream.prompt_logprobs] == [
        top_ids_of(one.token_id, 2) for one in stream.prompt_logprobs
    ]
    response = await stub.Generate(request)
    assert list(response.samples[0].logprobs) == sample.logprobs
    assert response.samples[0].cumulative_logprob == pytest.approx(total)
    assert list(response.prompt_logprobs) == stream.prompt_logprobs


async def test_log_probabilities_without_top_tokens_and_text(stub: Any) -> None:
    response = await stub.Generate(ask(output=pb.OutputOptions(logprobs=0, text=False)))
    (sample,) = response.samples
    assert len(sample.logprobs) == 20 and not response.prompt_logprobs
    assert not any(one.top_token_ids or one.text or one.top_texts for one in sample.logprobs)


async def test_the_prompts_log_probabilities_come_once_for_several_samples(engine: FakeEngine, stub: Any) -> None:
    stream = await read(stub.GenerateStream(ask(n=3, output=pb.OutputOptions(prompt_logprobs=0))))
    assert len(stream.prompt_logprobs) == stream.start.prompt_tokens - 1
    assert [submit.sampling.HasField("num_prompt_logprobs") for submit in engine.submits] == [True, False, False]


async def test_log_probabilities_end_with_the_stop_string(stub: Any, says: Any) -> None:
    says(TEXT)
    request = ask(max_tokens=500, stop={"stop_strings": ["fox"]}, output=pb.OutputOptions(logprobs=1))
    (sample,) = (await stub.Generate(request)).samples
    assert [one.token_id for one in sample.logprobs] == list(sample.token_ids)
    assert sample.cumulative_logprob == pytest.approx(sum(logprob_of(one) for one in sample.token_ids))


async def test_texts_of_tokens(tokenizer: ModelTokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert all("\ufffd" in one or one in TEXT for one in map(tokenizer.token_text, ids))
    assert tokenizer.token_text(2) == "<|im_end|>"


async def test_timings(engine: FakeEngine, stub: Any) -> None:
    for timings in (
        (await read(stub.GenerateStream(ask(output=pb.OutputOptions(timings=True))))).only.ended.timings,
        (await stub.Generate(ask(output=pb.OutputOptions(timings=True)))).samples[0].timings,
    ):
        assert timings.queue_us == QUEUE_US
        assert timings.batch_us[0] == timings.first_token_us > 0
        assert list(timings.batch_us) == sorted(timings.batch_us) and timings.total_us >= timings.batch_us[-1]
        assert list(timings.batch_tokens) == sorted(set(timings.batch_tokens)) and timings.batch_tokens[-1] == 20
    assert not (await stub.Generate(ask())).samples[0].HasField("timings")


async def test_timings_end_with_the_stop_string(engine: FakeEngine, stub: Any, says: Any) -> None:
    says(TEXT)
    engine.frames_per_step = 5
    request = ask(max_tokens=500, stop={"stop_strings": ["fox"]}, output=pb.OutputOptions(timings=True))
    (sample,) = (await stub.Generate(request)).samples
    assert sample.timings.batch_tokens[-1] == len(sample.token_ids)
    assert len(set(sample.timings.batch_tokens)) == len(sample.timings.batch_tokens)


async def test_a_continuation_that_may_differ_says_so_once(engine: FakeEngine, stub: Any) -> None:
    engine.best_effort_at = 7
    messages = [message async for message in stub.GenerateStream(ask())]
    marked = [message.chunk for message in messages if message.chunk.best_effort_continuation]
    (chunk,) = marked
    assert 7 in range(chunk.token_index, chunk.token_index + len(chunk.token_ids))


async def test_abort_of_one_request_of_several_samples(engine: FakeEngine, stub: Any) -> None:
    running = asyncio.ensure_future(read(stub.GenerateStream(ask(n=3, max_tokens=900, request_id="a"))))
    await until(lambda: len(engine.submits) == 3)
    await stub.Abort(pb.AbortRequest(request_ids=["a"]))
    assert {sample.ended.finish_reason for sample in (await running).samples} == {pb.FINISH_REASON_ABORT}
