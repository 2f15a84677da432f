"""Structured outputs become grammars, or errors that name the field, within limits of size, time and memory."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from llguidance import LLMatcher, LLTokenizer

from baton_protos import generation_pb2 as pb
from scheduler_service.api.errors import RequestError
from scheduler_service.api.request import StructuredKind, StructuredOutput
from scheduler_service.api.structured import GrammarChecker
from scheduler_service.api.structured_pool import Grammar, Refusal, WorkerPool

from .conftest import Serve
from .fake_engine import FakeEngine

EOS = (2, 0)
KIND = StructuredKind
SECONDS = 60.0  # generous: what must compile compiles in milliseconds
# A table of remainders: seconds of work, and hundreds of megabytes.
HEAVY = StructuredOutput(KIND.JSON_SCHEMA, ('{"type": "integer", "multipleOf": 9999991}',))
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
async def checker(checkpoint: Path) -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker.of_checkpoint(checkpoint, EOS, SECONDS)
    yield checker
    await checker.close()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> LLTokenizer:
    return LLTokenizer((checkpoint / "tokenizer.json").read_text(), eos_token=list(EOS))


def matches(tokenizer: LLTokenizer, grammar: str, text: str) -> bool:
    """Whether ``text`` is a whole text of ``grammar``."""
    matcher = LLMatcher(tokenizer, grammar)
    token_ids = tokenizer.greedy_tokenize(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


async def refusal(checker: GrammarChecker, structured: StructuredOutput) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await checker.check(structured)
    return caught.value


@pytest.mark.parametrize(
    ("structured", "good", "bad"),
    [
        (
            StructuredOutput(KIND.JSON_SCHEMA, (json.dumps(PERSON),)),
            ['{"name":"Ada","age":36}', '{"name": "Ada", "age": 36}'],
            ['{"name":"Ada"}', '{"name":"Ada",  "age":36}', '{\n"name":"Ada","age":36}', '{"name":"Ada","age":100}'],
        ),
        (StructuredOutput(KIND.JSON_OBJECT), ["{}", '{"a": [1, null], "b":{}}'], ["[]", "1", '{"a"}']),
        (StructuredOutput(KIND.REGEX, ("[0-9]{1,3}/(a|b)\\d?",)), ["1/a", "123/b7"], ["1234/a", "1/a77", "x1/a"]),
        (StructuredOutput(KIND.REGEX, ("^yes|no$",)), ["yes", "no"], ["yesno", "maybe"]),
        (
            StructuredOutput(KIND.CHOICE, ("a", "ab", "c.d|e", 'größer\n"\\', "日本\x7f🙂", "<|im_end|>")),
            ["a", "ab", "c.d|e", 'größer\n"\\', "日本\x7f🙂", "<|im_end|>"],
            ["b", "abb", "cxd|e", "größer"],
        ),
        (
            StructuredOutput(KIND.GRAMMAR, ('start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[0-9]+/\n',)),
            ["1", "1+22+3"],
            ["+1", "1+", "1-1"],
        ),
    ],
    ids=["json_schema", "json_object", "regex", "anchored", "choice", "grammar"],
)
async def test_a_grammar_matches_what_was_asked_for(
    checker: GrammarChecker, tokenizer: LLTokenizer, structured: StructuredOutput, good: list[str], bad: list[str]
) -> None:
    grammar = await checker.check(structured)
    assert [text for text in good if not matches(tokenizer, grammar, text)] == []
    assert [text for text in bad if matches(tokenizer, grammar, text)] == []


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        (StructuredOutput(KIND.JSON_SCHEMA, ("{type: object}",)), "key must be a string"),
        (StructuredOutput(KIND.JSON_SCHEMA, ("true",)), "object schema"),
        (StructuredOutput(KIND.JSON_SCHEMA, ('{"type": "strin"}',)), "Invalid type: strin"),
        (StructuredOutput(KIND.JSON_SCHEMA, ('{"type": "array", "uniqueItems": true}',)), "uniqueItems"),
        (StructuredOutput(KIND.JSON_SCHEMA, ('{"enum": []}',)), "Unsatisfiable"),
        (StructuredOutput(KIND.JSON_SCHEMA, ('{"items":' * 5000 + "{}" + "}" * 5000,)), "recursion limit"),
        (StructuredOutput(KIND.JSON_SCHEMA, (" " * 65_537,)), "at most 65536 bytes"),
        (StructuredOutput(KIND.REGEX, ("(",)), "unclosed group"),
        (StructuredOutput(KIND.REGEX, ("(?=a)b",)), "look-around"),
        (StructuredOutput(KIND.REGEX, ("[z&&a]",)), "matches no text"),
        (StructuredOutput(KIND.REGEX, ("é" * 8193,)), "is 16386 bytes long"),
        (StructuredOutput(KIND.REGEX, ("",)), "must not be empty"),
        (StructuredOutput(KIND.GRAMMAR, ("start: missing",)), 'unknown name: "missing"'),
        (StructuredOutput(KIND.GRAMMAR, ('start[stop="END"]: /[a-z]*/',)), "stop= is not supported"),
        (StructuredOutput(KIND.CHOICE), "must not be empty"),
        (StructuredOutput(KIND.CHOICE, ("a", "")), "must not be empty"),
        (StructuredOutput(KIND.CHOICE, ("a",) * 1025), "more than 1024"),
    ],
)
async def test_what_cannot_be_used_is_refused_by_name(
    checker: GrammarChecker, structured: StructuredOutput, message: str
) -> None:
    error = await refusal(checker, structured)
    assert error.status is grpc.StatusCode.INVALID_ARGUMENT
    assert error.field == f"sampling.structured.{structured.kind.value}"
    assert message in error.message


async def test_what_takes_too_long_is_killed_while_others_go_on(checkpoint: Path) -> None:
    pool = WorkerPool(checkpoint / "tokenizer.json", EOS, 0.5)
    checker = GrammarChecker(pool)
    try:
        slow = asyncio.create_task(checker.check(HEAVY))
        for number in range(20):
            await checker.check(StructuredOutput(KIND.REGEX, (f"a{{{number + 1}}}",)))
        with pytest.raises(RequestError, match=r"takes longer than 0\.5 s") as caught:
            await slow
        assert caught.value.field == "sampling.structured.json_schema"
        # Every process was lost, and is replaced.
        await asyncio.gather(*(refusal(checker, heavier) for heavier in (HEAVY, heavy(9999973), heavy(9999943))))
        assert await checker.check(StructuredOutput(KIND.REGEX, ("b",)))
    finally:
        await checker.close()


def heavy(divisor: int) -> StructuredOutput:
    return StructuredOutput(KIND.JSON_SCHEMA, (json.dumps({"type": "integer", "multipleOf": divisor}),))


async def test_what_takes_too_much_memory_is_refused(checkpoint: Path) -> None:
    checker = GrammarChecker(WorkerPool(checkpoint / "tokenizer.json", EOS, SECONDS, max_bytes=48 * 1024 * 1024))
    try:
        assert "too much memory" in (await refusal(checker, HEAVY)).message
        assert await checker.check(StructuredOutput(KIND.REGEX, ("b",)))
    finally:
        await checker.close()


class CountingPool:
    """A pool that answers when it is told to."""

    def __init__(self) -> None:
        self.jobs: list[StructuredOutput] = []
        self.gate = asyncio.Event()
        self.refusals: list[Refusal] = []

    async def compile(self, structured: StructuredOutput) -> Grammar | Refusal:
        self.jobs.append(structured)
        await self.gate.wait()
        return self.refusals.pop() if self.refusals else Grammar("".join(structured.texts))

    async def close(self) -> None:
        pass


async def test_equal_requests_compile_once() -> None:
    pool = CountingPool()
    checker = GrammarChecker(pool)  # type: ignore[arg-type]
    tasks = [asyncio.create_task(checker.check(StructuredOutput(KIND.REGEX, ("a",)))) for _ in range(5)]
    await asyncio.sleep(0)
    tasks[0].cancel()  # the one that asked first leaves
    pool.gate.set()
    assert await asyncio.gather(*tasks[1:]) == ["a"] * 4
    assert await checker.check(StructuredOutput(KIND.REGEX, ("a",))) == "a"
    assert len(pool.jobs) == 1
    assert await checker.check(StructuredOutput(KIND.CHOICE, ("a", "b"))) == "ab"
    assert await checker.check(StructuredOutput(KIND.CHOICE, ("ab",))) == "ab"
    assert len(pool.jobs) == 3


async def test_only_certain_refusals_are_remembered() -> None:
    pool = CountingPool()
    pool.gate.set()
    checker = GrammarChecker(pool)  # type: ignore[arg-type]
    pool.refusals = [Refusal("too slow", is_certain=False)]
    structured = StructuredOutput(KIND.REGEX, ("a",))
    assert (await refusal(checker, structured)).message == "too slow"
    assert await checker.check(structured) == "a"
    pool.refusals = [Refusal("wrong")]
    for _ in range(2):
        assert (await refusal(checker, StructuredOutput(KIND.REGEX, ("b",)))).message == "wrong"
    assert len(pool.jobs) == 3


async def test_too_many_that_wait_are_turned_away(checkpoint: Path) -> None:
    checker = GrammarChecker.of_checkpoint(checkpoint, EOS, SECONDS)
    try:
        results = await asyncio.gather(
            *(checker.check(StructuredOutput(KIND.REGEX, (f"a{number}",))) for number in range(100)),
            return_exceptions=True,
        )
    finally:
        await checker.close()
    errors = [one for one in results if isinstance(one, RequestError)]
    assert {error.status for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert 0 < len(errors) < len(results)


@pytest.mark.parametrize("eos", [(), EOS], ids=["no end", "no tokenizer"])
async def test_without_a_tokenizer_or_an_end_there_are_no_grammars(
    checkpoint: Path, tmp_path: Path, eos: tuple[int, ...]
) -> None:
    checker = GrammarChecker.of_checkpoint(tmp_path if eos else checkpoint, eos, SECONDS)
    error = await refusal(checker, StructuredOutput(KIND.JSON_OBJECT))
    assert error.status is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_tokenizer_that_does_not_go_with_grammars(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    checker = GrammarChecker.of_checkpoint(tmp_path, EOS, SECONDS)
    error = await refusal(checker, StructuredOutput(KIND.JSON_OBJECT))
    await checker.close()
    assert error.status is grpc.StatusCode.FAILED_PRECONDITION
    assert "Model missing" in error.message


def test_the_worker_loads_neither_grpc_nor_torch() -> None:
    code = (
        "import sys, scheduler_service.api.structured_worker;"
        "sys.exit(any(name in sys.modules for name in ('grpc', 'torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_every_sample_carries_the_grammar(engine: FakeEngine, serve: Serve) -> None:
    stub = (await serve(grammar_timeout=SECONDS)).stub
    structured = pb.StructuredOutput(choice=pb.Choices(texts=["yes", "no"]))
    request = pb.GenerateRequest(
        text="def", sampling=pb.SamplingParams(structured=structured), stop=pb.StopConditions(max_tokens=4), n=2
    )
    await stub.Generate(request)
    await stub.Generate(pb.GenerateRequest(text="def", stop=pb.StopConditions(max_tokens=4)))
    grammars = [submit.sampling.grammar for submit in engine.submits]
    assert grammars == [LLMatcher.grammar_from_regex("yes|no")] * 2 + [""]


async def test_a_text_that_is_complete_already_ends_at_once(
    engine: FakeEngine, serve: Serve, tokenizer: LLTokenizer
) -> None:
    """An executor would have to end it with a token more than it has."""
    stub = (await serve(grammar_timeout=SECONDS)).stub
    sampling = pb.SamplingParams(seed=1, structured=pb.StructuredOutput(choice=pb.Choices(texts=["yes", "no"])))
    points = [
        pb.ResumePoint(sample=index, token_ids=tokenizer.greedy_tokenize(text), text_offset=len(text))
        for index, text in enumerate(["yes", "n"])
    ]
    request = pb.GenerateRequest(
        text="def", sampling=sampling, stop=pb.StopConditions(max_tokens=20), n=2, resume=points
    )
    whole, begun = (await stub.Generate(request)).samples
    assert list(whole.token_ids) == [] and whole.finish_reason == pb.FINISH_REASON_STOP
    assert begun.token_ids
    assert len(engine.submits) == 1


@pytest.mark.parametrize(
    ("pattern", "text", "is_over"),
    [("yes|no", "yes", True), ("yes|no", "ye", False), ("[0-9]+", "12", False), ("yes|no", "yesno", False)],
)
async def test_what_nothing_can_follow_is_over(
    checker: GrammarChecker, tokenizer: LLTokenizer, pattern: str, text: str, is_over: bool
) -> None:
    grammar = await checker.check(StructuredOutput(KIND.REGEX, (pattern,)))
    assert await checker.are_over(grammar, [tokenizer.greedy_tokenize(text)]) == [is_over]


async def test_all_samples_share_the_time_limit(checkpoint: Path, tmp_path: Path) -> None:
    """A process that answers once and then no more, so that a limit for each sample would start one after another."""
    started = tmp_path / "started"
    code = (
        f"import sys; open({str(started)!r}, 'a').write('one ');"
        "print('{}', flush=True); sys.stdin.readline(); print('{\"is_over\": true}', flush=True); sys.stdin.read()"
    )
    pool = WorkerPool(checkpoint / "tokenizer.json", EOS, 1.0)
    pool._command = [sys.executable, "-c", code]
    assert await pool.are_over(Grammar(""), [[1], [1], [1], [1]]) == [True, False, False, False]
    assert started.read_text() == "one "
    await pool.close()


async def test_whoever_leaves_takes_no_answer_of_anybody_else(checkpoint: Path, tokenizer: LLTokenizer) -> None:
    pool = WorkerPool(checkpoint / "tokenizer.json", EOS, SECONDS)
    grammar = await pool.compile(StructuredOutput(KIND.REGEX, ("a+",)))
    assert isinstance(grammar, Grammar)
    asking = asyncio.ensure_future(pool.are_over(grammar, [tokenizer.greedy_tokenize("a" * 2000)]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert isinstance(await pool.compile(StructuredOutput(KIND.REGEX, ("b+",))), Grammar)
    await pool.close()


async def test_the_time_limit_is_a_setting(engine: FakeEngine, serve: Serve) -> None:
    stub = (await serve(grammar_timeout=0.25)).stub
    structured = pb.StructuredOutput(json_schema=HEAVY.texts[0])
    with pytest.raises(grpc.aio.AioRpcError, match=r"takes longer than 0\.25 s") as caught:
        await stub.Generate(pb.GenerateRequest(text="def", sampling=pb.SamplingParams(structured=structured)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert engine.submits == []
