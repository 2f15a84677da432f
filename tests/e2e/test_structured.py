"""Structured output with real processes: always what was asked for, whatever happens to the executors."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest

from baton import AsyncClient, AsyncStream, Client, Completion, FinishReason, InvalidRequestError, LocalCluster
from baton.checkpoints import TINY_PYTHON
from tests.e2e.harness import options

RUNS = 10
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "long one", 7, None]}, "maxItems": 3},
        "born": {"type": "string", "pattern": "^(19|20)[0-9]{2}-(0[1-9]|1[0-2])$"},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "is_own": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}
SHAPE = {
    "anyOf": [
        {"type": "integer", "minimum": -50, "maximum": 50},
        {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 2, "maxItems": 4},
        {"$ref": "#/$defs/pair"},
    ],
    "$defs": {
        "pair": {
            "type": "object",
            "properties": {"left": {"type": "boolean"}, "right": {"const": "x"}},
            "required": ["left", "right"],
            "additionalProperties": False,
        }
    },
}
# Every length is bounded, so no text of either schema has as many bytes, let alone tokens.
BOUND = 400
# Tables of remainders: seconds of work each.
HEAVY = [{"type": "integer", "multipleOf": divisor} for divisor in (9999991, 9999973, 9999943)]
# Long enough to be disturbed.
LIST = {"type": "array", "items": {"enum": ["red", "green", "blue", 1, 22, True]}, "minItems": 120, "maxItems": 120}
STREAMS = 6


@pytest.fixture(scope="module")
def tiny() -> Iterator[LocalCluster]:
    with LocalCluster(options(TINY_PYTHON, run_ahead="8")) as running:
        yield running


@pytest.fixture
def tiny_client(tiny: LocalCluster) -> Iterator[Client]:
    with Client(tiny.address) as connected:
        yield connected


def generate_all(address: str, requests: Sequence[dict[str, Any]]) -> list[Completion]:
    """All requests at the same time."""

    async def run() -> list[Completion]:
        async with AsyncClient(address) as client:
            return list(await asyncio.gather(*(client.generate("def read(path):\n", **one) for one in requests)))

    return asyncio.run(run())


@pytest.mark.parametrize("schema", [PERSON, SHAPE], ids=["person", "shape"])
def test_json_is_what_its_schema_says(tiny: LocalCluster, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    requests = [{"json_schema": schema, "seed": seed, "temperature": 1.0, "max_tokens": BOUND} for seed in range(RUNS)]
    done = generate_all(tiny.address, requests)
    for one in done:
        jsonschema.validate(json.loads(one.text), schema)
    assert {one.finish_reason for one in done} == {FinishReason.STOP}
    assert len({one.text for one in done}) > RUNS // 2


def test_every_format(tiny_client: Client) -> None:
    prompt = "x = "
    assert tiny_client.generate(prompt, choice=["None", "[None]", "None, None"], seed=1).text in (
        "None", "[None]", "None, None",
    )  # fmt: skip
    assert tiny_client.generate(prompt, regex="[0-9]{3}-(ab|cd)", seed=1).text[3] == "-"
    text = tiny_client.generate(prompt, grammar='start: "(" NAME ("," NAME)? ")"\nNAME: /[a-z]{1,5}/', seed=1).text
    assert text[0] == "(" and text[-1] == ")"
    cut = tiny_client.generate(prompt, json_object=True, seed=1, max_tokens=20)
    assert cut.text.startswith("{")


def test_the_end_of_the_grammar_ends_it_even_past_the_end_of_the_sequence(tiny_client: Client) -> None:
    for ignore_eos in (False, True):
        # Nothing can follow five digits; after two to four an end of sequence may.
        for regex in ("[0-9]{5}", "[0-9]{2,5}"):
            for seed in range(4):
                done = tiny_client.generate("n = ", regex=regex, ignore_eos=ignore_eos, seed=seed, max_tokens=50)
                assert done.finish_reason is FinishReason.STOP
                assert done.text.isdigit() and 2 <= len(done.text) <= 5


def test_a_cut_text_reports_length(tiny_client: Client) -> None:
    done = tiny_client.generate("x = ", json_schema=LIST, seed=1, max_tokens=7)
    assert done.finish_reason is FinishReason.LENGTH
    assert len(done.token_ids) == 7


def test_what_takes_too_long_is_refused_while_streams_go_on(tiny: LocalCluster) -> None:
    async def run() -> tuple[int, int]:
        async with AsyncClient(tiny.address) as client:
            stream = client.stream("def f(", max_tokens=1900, ignore_eos=True, seed=1)
            refused = asyncio.gather(
                *(client.generate("x", json_schema=heavy) for heavy in HEAVY), return_exceptions=True
            )
            received = deltas_meanwhile = 0
            async for delta in stream:
                received += len(delta.token_ids)
                deltas_meanwhile += not refused.done()
            for error in await refused:
                assert isinstance(error, InvalidRequestError) and "takes longer than 1 s" in str(error)
                assert error.field == "sampling.structured.json_schema"
            return received, deltas_meanwhile

    received, deltas_meanwhile = asyncio.run(run())
    assert received == 1900
    assert deltas_meanwhile > 5


def test_grammars_that_are_wrong_are_refused(tiny_client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="unclosed group") as caught:
        tiny_client.generate("x", regex="(")
    assert caught.value.field == "sampling.structured.regex"


class Disturbed:
    """Streams with and without a grammar; counts what has come of each."""

    def __init__(self) -> None:
        plain = {"max_tokens": 300, "ignore_eos": True}
        self._options = [{"json_schema": LIST, "max_tokens": 1000} if index % 3 else plain for index in range(STREAMS)]
        self.counts = [0] * STREAMS

    async def run(self, client: AsyncClient) -> list[Completion]:
        streams = [client.stream("colors = ", seed=seed, **one) for seed, one in enumerate(self._options)]
        return list(await asyncio.gather(*(self._read(index, stream) for index, stream in enumerate(streams))))

    async def reached(self, count: int) -> None:
        while min(self.counts) < count:
            await asyncio.sleep(0.005)

    async def _read(self, index: int, stream: AsyncStream) -> Completion:
        async for delta in stream:
            self.counts[index] += len(delta.token_ids)
        return stream.completion


def outcome(done: Sequence[Completion]) -> list[tuple[str, tuple[int, ...], FinishReason]]:
    return [(one.text, one.token_ids, one.finish_reason) for one in done]


@pytest.fixture(scope="module")
def undisturbed(tiny: LocalCluster) -> list[tuple[str, tuple[int, ...], FinishReason]]:
    async def run() -> list[Completion]:
        async with AsyncClient(tiny.address) as client:
            return await Disturbed().run(client)

    done = asyncio.run(run())
    for one in done[1:3]:
        jsonschema.validate(json.loads(one.text), LIST)
    return outcome(done)


@pytest.mark.parametrize("run_ahead", ["1", "2"])
def test_preempted_rows_go_on_where_they_were(
    undisturbed: list[tuple[str, tuple[int, ...], FinishReason]], run_ahead: str
) -> None:
    """And the depth of run-ahead does not show."""
    longest = max(len(token_ids) for _, token_ids, _ in undisturbed)
    blocks = 2 * -(-longest // 16) + 4  # for two of the streams
    with LocalCluster(options(TINY_PYTHON, run_ahead=run_ahead, num_blocks=blocks)) as cluster:

        async def run() -> list[Completion]:
            async with AsyncClient(cluster.address) as client:
                return await Disturbed().run(client)

        assert outcome(asyncio.run(run())) == undisturbed
        with Client(cluster.address) as client:
            assert sum(one.preemptions for one in client.cluster_status().executors) > 0


def test_rows_go_on_when_their_executor_is_killed(
    undisturbed: list[tuple[str, tuple[int, ...], FinishReason]],
) -> None:
    with LocalCluster(options(TINY_PYTHON, executors=2)) as cluster:

        async def run() -> list[Completion]:
            streams = Disturbed()
            async with AsyncClient(cluster.address) as client:
                running = asyncio.create_task(streams.run(client))
                await streams.reached(20)
                for pid in cluster.executor_pids().values():
                    os.kill(pid, signal.SIGKILL)
                assert not running.done()
                return await running

        assert outcome(asyncio.run(run())) == undisturbed
