"""Every entry refuses everything that breaks a limit, in the same way, and the engine never hears of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from baton_protos import generation_pb2 as pb
from baton_protos.columns import unpack
from scheduler_service.api import generation_wire as wire
from scheduler_service.api.errors import RequestError
from scheduler_service.api.rules import RULES, RequestLimits, Rule

from .conftest import Serve, Served, free_port
from .entries import ENTRIES, batch_refusals
from .fake_engine import VOCAB_SIZE, FakeEngine
from .violations import HARMLESS, VIOLATIONS, ids

LIMITS = RequestLimits("tiny", (2, 0), has_tokenizer=True, vocab_size=VOCAB_SIZE, max_total_tokens=1000)


@pytest.mark.parametrize("entry", ENTRIES)
async def test_every_entry_refuses_what_breaks_a_limit(entry: str, engine: FakeEngine, serve: Serve) -> None:
    served: Served = await serve(vllm_grpc_port=free_port())
    wrong, said = {}, 0
    for name, (request, field) in VIOLATIONS.items():
        answer = await ENTRIES[entry](served, request)
        said += answer is not None
        if answer not in (None, ("INVALID_ARGUMENT", field)):
            wrong[name] = answer
    assert not wrong
    assert said > 25
    assert not engine.submits


@pytest.mark.parametrize("entry", ENTRIES)
async def test_every_entry_takes_a_sound_request(entry: str, engine: FakeEngine, serve: Serve) -> None:
    served: Served = await serve(vllm_grpc_port=free_port())
    sound = pb.GenerateRequest(
        token_ids=ids(5, 6, 7),
        sampling=pb.SamplingParams(temperature=0.5, top_k=5, logit_bias={5: 1.0}, seed=3),
        stop=pb.StopConditions(max_tokens=9, stop_strings=["§"], stop_token_ids=[7]),
        n=2,
    )
    assert await ENTRIES[entry](served, sound) == ("OK", "")
    taken = [submit.sampling for submit in engine.submits]
    assert [(one.top_k, one.temperature, len(unpack(one.bias_token_ids))) for one in taken] == [(5, 0.5, 1)] * 2
    assert [submit.max_tokens for submit in engine.submits] == [9, 9]


async def test_the_command_line_refuses_what_breaks_a_limit(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    served: Served = await serve()
    # What a file of 30 MB would be needed for is left to the other entries.
    small = {name: one for name, one in VIOLATIONS.items() if one[0].ByteSize() < 100_000}
    answers = await batch_refusals(served, [request for request, _ in small.values()], tmp_path)
    refused = dict(zip(small, answers, strict=True))
    expected = {name: field for name, (_, field) in small.items()}
    assert {
        name: answer
        for name, answer in refused.items()
        if answer is not None and not answer.startswith(f"{expected[name]}: ")
    } == {}
    assert sum(answer is not None for answer in answers) > 50
    assert not engine.submits


def broken_rule(request: pb.GenerateRequest) -> Rule | None:
    try:
        decoded = wire.decode_request(request)
    except RequestError:
        return None
    return next((rule for rule in RULES if not rule.holds(decoded, LIMITS)), None)


# Callers cannot write these values into the message, or are refused as it is decoded; other dialects may bring them.
OF_OTHER_DIALECTS = [
    rule
    for rule in RULES
    if (rule.field, rule.message)
    in {
        ("sampling.seed", "must be from 0 to 2^64 - 1"),
        ("sampling.logit_bias", "has more than {max_biased_token_ids} ids"),
        ("stop.stop_strings", "has more than {max_stop_strings} texts"),
        ("stop.deadline_unix_ms", "must not be negative"),
    }
]


def test_every_rule_has_a_violation() -> None:
    broken = [broken_rule(request) for request, _ in VIOLATIONS.values()]
    assert [rule for rule in RULES if rule not in broken] == OF_OTHER_DIALECTS
    for rule, (_, field) in zip(broken, VIOLATIONS.values(), strict=True):
        assert rule is None or rule.field == field


def fields(message: Descriptor, path: str = "") -> Iterator[str]:
    """Paths of all fields of a request, other than those of prompts and below a structured output."""
    for field in message.fields:
        name = path + field.name
        inner = field.message_type
        if inner is None or field.is_repeated or inner.name in ("TokenIds", "ChatMessages", "StructuredOutput"):
            yield name
        else:
            yield from fields(inner, f"{name}.")


def test_every_field_has_a_violation_or_is_harmless() -> None:
    covered = {field for _, field in VIOLATIONS.values()} | HARMLESS
    assert set(fields(pb.GenerateRequest.DESCRIPTOR)) <= covered
