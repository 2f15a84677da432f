"""The Open Inference Protocol with Triton's own client, blocking and asyncio."""

from typing import Any

from google.protobuf.descriptor import Descriptor

from baton import Client
from baton_protos import open_inference_pb2 as pb
from tests.e2e.harness import eventually, is_idle
from tests.foreign import ForeignScript

MODEL = "tiny_python"
TEXT = "def add(a, b):"
GREEDY = {"temperature": 0, "max_tokens": 30}


def test_our_protocol_is_theirs(triton: ForeignScript) -> None:
    theirs = triton.call("field_numbers")
    ours: dict[str, list[list[Any]]] = {}

    def walk(descriptor: Descriptor) -> None:
        ours[descriptor.full_name] = sorted(
            [field.name, field.number, field.type, field.is_repeated] for field in descriptor.fields
        )
        for nested in descriptor.nested_types:
            walk(nested)

    for descriptor in pb.DESCRIPTOR.message_types_by_name.values():
        walk(descriptor)
    foreign = {name: [field for field in fields if field not in theirs[name]] for name, fields in ours.items()}
    assert {name: fields for name, fields in foreign.items() if fields} == {}


def test_health(triton: ForeignScript) -> None:
    assert triton.call("health", model=MODEL) == [True, True, True, False]


def test_metadata(triton: ForeignScript) -> None:
    server, metadata, config = triton.call("about", model=MODEL)
    assert server["name"] == "baton"
    assert {tensor["name"] for tensor in metadata["inputs"]} >= {"text_input", "stream", "sampling_parameters"}
    assert {tensor["name"]: tensor["datatype"] for tensor in metadata["outputs"]}["text_output"] == "BYTES"
    assert config["config"]["model_transaction_policy"] == {"decoupled": True}


def test_infer(triton: ForeignScript, client: Client) -> None:
    own = client.generate(TEXT, **GREEDY)
    flags = {"exclude_input_in_output": True, "return_finish_reason": True, "return_num_output_tokens": True}
    got = triton.call("infer", model=MODEL, text=TEXT, call_id="7", **GREEDY, **flags)
    assert got.pop("final") is False  # said in streams only
    assert got == {"id": "7", "text_output": [own.text], "finish_reason": ["length"], "num_output_tokens": [30]}
    assert triton.call("infer", model=MODEL, text=TEXT, **GREEDY)["text_output"] == [TEXT + own.text]


def test_parameters(triton: ForeignScript, client: Client) -> None:
    sampling = {"temperature": 0.7, "top_k": 20, "seed": 3, "max_tokens": 20}
    own = client.generate(TEXT, **sampling)
    answer = triton.call("infer_by_parameters", model=MODEL, text=TEXT, priority=5, **sampling)
    assert answer["text_output"] == [TEXT + own.text]


def test_outputs_by_name(triton: ForeignScript) -> None:
    names = ["logprobs", "cumulative_logprob", "num_input_tokens", "text_output"]
    got = triton.call("outputs", model=MODEL, text=TEXT, names=names, n=2, seed=1, max_tokens=5, logprobs=2)
    assert set(got) == {"id", "final", *names}
    assert len(set(got["text_output"])) == 2
    assert all(value < 0 for value in got["cumulative_logprob"])
    assert got["num_input_tokens"][0] > 3


def test_errors(triton: ForeignScript) -> None:
    status, message = triton.call("infer_error", model=MODEL, text=TEXT, temperature=-1)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("sampling.temperature: ")
    status, _ = triton.call("infer_error", model="another", text=TEXT)
    assert status == "StatusCode.NOT_FOUND"


def test_streams_carry_many_requests(triton: ForeignScript, client: Client) -> None:
    requests: list[dict[str, Any]] = [
        {"id": str(index), "text": TEXT, "stream": True, "temperature": 1.0, "seed": index, "max_tokens": 10 * index}
        for index in range(1, 7)
    ]
    broken = {"id": "broken", "text": TEXT, "top_p": 7}
    answers = triton.call("stream", model=MODEL, requests=[*requests, broken])
    (error,) = [answer["error"] for answer in answers if "error" in answer]
    assert error.startswith("[request id: broken] sampling.top_p: ")
    for request in requests:
        mine = [answer for answer in answers if answer.get("id") == request["id"]]
        assert [answer["final"] for answer in mine] == [False] * (len(mine) - 1) + [True]
        own = client.generate(TEXT, temperature=1.0, seed=request["seed"], max_tokens=request["max_tokens"])
        assert "".join(answer["text_output"][0] for answer in mine) == own.text


def test_the_last_answer_may_be_empty(triton: ForeignScript) -> None:
    request = {"id": "a", "text": TEXT, "stream": True, **GREEDY}
    answers = triton.call("stream", model=MODEL, requests=[request], enable_empty_final_response=True)
    assert [answer["final"] for answer in answers] == [False] * (len(answers) - 1) + [True]


def test_cancelled_streams_free_blocks(triton: ForeignScript, client: Client) -> None:
    endless = {"stream": True, "max_tokens": 1900, "ignore_eos": True}
    assert triton.call("leave_stream", model=MODEL, text=TEXT, count=3, **endless) == "StatusCode.CANCELLED"
    assert eventually(lambda: is_idle(client.cluster_status()), seconds=20)
    triton.call("aio_leave", model=MODEL, text=TEXT, max_tokens=1900, ignore_eos=True)
    assert eventually(lambda: is_idle(client.cluster_status()), seconds=20)


def test_asyncio(triton: ForeignScript, client: Client) -> None:
    own = client.generate(TEXT, **GREEDY).text
    whole, pieces = triton.call("aio_calls", model=MODEL, text=TEXT, **GREEDY)
    assert whole["text_output"] == [TEXT + own]
    for index in range(2):
        assert "".join(piece["text_output"][0] for piece in pieces if piece["id"] == str(index)) == own


def test_statistics(triton: ForeignScript) -> None:
    def count() -> int:
        (stats,) = triton.call("statistics", model=MODEL)["model_stats"]
        return int(stats.get("inference_count", 0))

    before = count()
    triton.call("infer", model=MODEL, text=TEXT, **GREEDY)
    assert count() == before + 1
