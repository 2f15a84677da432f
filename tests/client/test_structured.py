"""Structured outputs as callers ask for them: keywords, lines of a batch, flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton import InvalidRequestError, SamplingParams
from baton.cli.request_lines import json_lines
from baton.messages import generate_request
from baton_protos import generation_pb2 as pb
from tests.client.fake_server import FakeServer
from tests.client.test_cli import STREAM, run

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}


def structured(**options: Any) -> pb.StructuredOutput:
    return generate_request("x", **options).sampling.structured


def test_each_keyword_sets_its_format() -> None:
    assert json.loads(structured(json_schema=SCHEMA).json_schema) == SCHEMA
    assert structured(json_schema='{"type": "array"}').json_schema == '{"type": "array"}'
    assert structured(json_object=True).json_object
    assert structured(regex="[a-z]+").regex == "[a-z]+"
    assert list(structured(choice=["yes", "no"]).choice.texts) == ["yes", "no"]
    assert list(structured(choice="yes").choice.texts) == ["yes"]
    assert structured(grammar='start: "a"').grammar == 'start: "a"'
    assert structured(**SamplingParams(regex="a").options()).regex == "a"
    assert not generate_request("x", regex=None, choice=None).sampling.HasField("structured")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"regex": "a", "choice": ["b"]}, "sampling.structured"),
        ({"choice": []}, "sampling.structured.choice"),
        ({"choice": [1]}, "sampling.structured.choice.texts"),
        ({"regex": 3}, "sampling.structured.regex"),
        ({"json_schema": ["a"]}, "sampling.structured.json_schema"),
    ],
)
def test_what_does_not_fit_is_refused_here(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate_request("x", **options)
    assert caught.value.field == field


def test_a_line_of_a_batch_may_bring_a_schema() -> None:
    lines = [{"prompt": "x", "json_schema": SCHEMA}, {"prompt": "x", "choice": ["a", "b"]}, {"prompt": "x", "regex": 1}]
    first, second, third = (one.request for one in json_lines("\n".join(map(json.dumps, lines)).encode(), {}))
    assert not isinstance(first, InvalidRequestError) and first.options == {"json_schema": SCHEMA}
    assert not isinstance(second, InvalidRequestError) and second.options == {"choice": ["a", "b"]}
    assert isinstance(third, InvalidRequestError) and str(third) == "regex: must be text"


def test_flags(server: FakeServer, tmp_path: Path) -> None:
    server.stream = list(STREAM)
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "array"}')
    grammar.write_text('start: "a"')
    for flags in (
        ("--json-schema", str(schema)),
        ("--json-schema", '{"type": "string"}'),
        ("--regex", "a|b"),
        ("--choice", "yes", "--choice", "no"),
        ("--grammar", str(grammar)),
    ):
        done = run("generate", "x", "--server", server.address, *flags)
        assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    sent = [request.sampling.structured for request in server.requests]
    assert [one.json_schema for one in sent[:2]] == ['{"type": "array"}', '{"type": "string"}']
    assert (sent[2].regex, list(sent[3].choice.texts), sent[4].grammar) == ("a|b", ["yes", "no"], 'start: "a"')


def test_a_schema_file_that_is_not_there() -> None:
    done = run("generate", "x", "--json-schema", "nowhere.json")
    assert done.returncode == 2
    message = " ".join(done.stderr.replace("│", " ").split())
    assert "--json-schema: cannot read nowhere.json: No such file or directory" in message
