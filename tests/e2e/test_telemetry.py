"""Traces and logs of real requests, one of which loses its executor on the way; and nothing of what they say in either.

The tests share a cluster; each makes its own requests.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton import Client, Completion, InvalidRequestError, LocalCluster
from baton_protos import generation_pb2 as pb
from baton_protos.generation_pb2_grpc import GenerationStub
from tests.e2e.collector import Collector, Span, attributes
from tests.e2e.harness import eventually, options

SECRET = "zanzibar"  # in every prompt, and nowhere else
SECONDS = 30.0
TRACE_ID, CALLER_SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Setting:
    cluster: LocalCluster
    client: Client
    collector: Collector
    logs: Path

    def span(self, request_id: str) -> Span:
        assert eventually(lambda: self.collector.request(request_id) is not None, SECONDS)
        span = self.collector.request(request_id)
        assert span is not None
        return span

    def log(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.logs / f"{name}.log").read_text().splitlines()]

    def ended(self, request_id: str) -> dict[str, Any]:
        def lines() -> list[dict[str, Any]]:
            return [one for one in self.log("scheduler") if one.get("request_id") == request_id]

        assert eventually(lambda: len(lines()) == 1, SECONDS)
        return lines()[0]

    def ask(self, request_id: str, max_tokens: int = 8) -> Completion:
        with self.client.stream(
            f"def {SECRET}():", request_id=request_id, max_tokens=max_tokens, ignore_eos=True, temperature=0
        ) as stream:
            return stream.result()

    def ask_with(self, request_id: str, traceparent: str) -> None:
        request = pb.GenerateRequest(request_id=request_id, text=SECRET, stop=pb.StopConditions(max_tokens=2))
        with grpc.insecure_channel(self.cluster.address) as channel:
            stub = GenerationStub(channel)  # type: ignore[no-untyped-call]
            stub.Generate(request, metadata=(("traceparent", traceparent),))


@pytest.fixture(scope="module")
def setting(checkpoint_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    logs = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch, Collector() as collector:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.setenv("OTEL_SERVICE_NAME", "from-the-environment")
        log_format = ("--log-format", "json")
        chosen = options(
            checkpoint_f32,
            log_dir=logs,
            log_level="info",
            scheduler_arguments=("--tracing", "--log-requests", *log_format),
            executor_arguments=log_format,
        )
        with LocalCluster(chosen) as cluster, Client(cluster.address) as client:
            yield Setting(cluster, client, collector, logs)


def test_a_request_has_a_span_and_its_phases(setting: Setting) -> None:
    completion = setting.ask("plain")
    span = setting.span("plain")
    assert (span.name, span.kind, span.parent_span_id) == ("text_completion random-f32", Span.SPAN_KIND_SERVER, b"")
    assert attributes(span) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": "random-f32",
        "gen_ai.response.id": "plain",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": completion.usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 8,
        "baton.executor_losses": 0,
        "baton.stalls": 0,
    }
    children = setting.collector.children(span)
    phases = ["tokenize", "queue", "prefill", "decode"]
    assert sorted(children) == sorted(phases)
    moments = [span.start_time_unix_nano]
    for (phase,) in (children[name] for name in phases):  # each begins where the one before ends
        assert phase.start_time_unix_nano == moments[-1] <= phase.end_time_unix_nano
        moments.append(phase.end_time_unix_nano)
    assert moments[-1] <= span.end_time_unix_nano
    assert setting.collector.resources[0]["service.name"] == "from-the-environment"


def test_the_callers_trace_goes_on(setting: Setting) -> None:
    setting.ask_with("traced", f"00-{TRACE_ID}-{CALLER_SPAN_ID}-01")
    span = setting.span("traced")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, CALLER_SPAN_ID)
    assert {one.trace_id.hex() for (one,) in setting.collector.children(span).values()} == {TRACE_ID}


def test_a_caller_who_does_not_sample_gets_no_span(setting: Setting) -> None:
    setting.ask_with("not-sampled", f"00-{TRACE_ID}-{CALLER_SPAN_ID}-00")
    setting.ask("afterwards")
    setting.span("afterwards")
    assert setting.collector.request("not-sampled") is None


def test_a_refused_request_has_a_span_too(setting: Setting) -> None:
    with pytest.raises(InvalidRequestError):
        setting.client.generate(SECRET, request_id="refused", top_p=2.0)
    span = setting.span("refused")
    found = attributes(span)
    assert (found["gen_ai.response.finish_reasons"], found["error.type"]) == (["invalid"], "INVALID_ARGUMENT")
    assert set(setting.collector.children(span)) == {"tokenize"}
    line = setting.ended("refused")
    assert (line["outcome"], line["status"], line["field"]) == ("invalid", "INVALID_ARGUMENT", "sampling.top_p")
    assert "ttft_ms" not in line


def test_a_request_is_a_line_of_the_log(setting: Setting) -> None:
    setting.ask("logged")
    line = setting.ended("logged")
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "baton.requests", "request ended")
    assert (line["outcome"], line["output_tokens"], line["executor_losses"]) == ("length", 8, 0)
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"]
    assert "status" not in line and "field" not in line
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", line["time"])


def test_a_lost_executor_is_a_stall(setting: Setting) -> None:
    with setting.client.stream(
        SECRET, request_id="disturbed", max_tokens=1000, ignore_eos=True, temperature=0
    ) as stream:
        next(stream)
        os.kill(setting.cluster.executor_pids()["executor-0"], signal.SIGKILL)
        assert stream.result().usage.completion_tokens == 1000
    span = setting.span("disturbed")
    (stall,) = setting.collector.children(span)["stall"]
    assert stall.end_time_unix_nano - stall.start_time_unix_nano >= 500_000_000
    assert attributes(span)["baton.stalls"] == setting.ended("disturbed")["stalls"] == 1
    assert attributes(span)["baton.executor_losses"] == setting.ended("disturbed")["executor_losses"] == 1
    lost = [line for line in setting.log("scheduler") if line["message"].startswith("executor lost")]
    assert [(line["executor_id"], line["requests"]) for line in lost] == [("executor-0", 1)]


def test_nothing_tells_what_was_asked(setting: Setting) -> None:
    """Runs last: looks at all that the tests above have left."""
    setting.ask("last")
    setting.span("last")
    setting.ended("last")
    assert "gen_ai.response.id" in setting.collector.received
    assert SECRET not in setting.collector.received
    files = sorted(setting.logs.iterdir())
    assert [file.name for file in files] == ["executor-0.log", "scheduler.log"]
    for file in files:
        assert SECRET not in file.read_text()
        assert all({"time", "level", "logger", "message"} <= json.loads(line).keys() for line in file.open())
