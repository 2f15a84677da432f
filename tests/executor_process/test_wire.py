"""Frames against protobuf messages written by hand, and against golden bytes."""

import numpy as np
import pytest

from baton_protos import execution_pb2 as pb
from executor_service import wire
from executor_service.step_plan import (
    Fault,
    FaultCode,
    LogprobColumns,
    MalformedPlan,
    RowPromptLogprobs,
    StepPlan,
    StepResult,
    StepTimings,
)

HEADER = wire.Header("s", 7, 2, 3, 4)


def _plan_envelope() -> pb.Envelope:
    plan = pb.StepPlan(
        step_id=5,
        released_rows=np.array([1], "<i4").tobytes(),
        extend_rows=np.array([0], "<i4").tobytes(),
        extend_blocks=np.array([3], "<i4").tobytes(),
        rows=np.array([0, 2], "<i4").tobytes(),
        num_tokens=np.array([1, 2], "<i4").tobytes(),
        start_positions=np.array([4, 0], "<i4").tobytes(),
        flags=bytes([1, 3]),
        prefill_token_ids=np.array([11, 12], "<i4").tobytes(),
        slot_mapping=np.array([12, 36, 37], "<i4").tobytes(),
        table_hashes=np.array([0xFFFFFFFF, 10], "<u4").tobytes(),
        after_idle=True,
    )
    plan.admissions.add(
        row=2,
        block_ids=np.array([9], "<i4").tobytes(),
        sampling=pb.RowSampling(temperature=0.5, top_k=40, top_p=0.75, seed=2**64 - 1),
        prompt_len=2,
        token_ids=np.array([11, 12], "<i4").tobytes(),
    )
    return pb.Envelope(version=1, scheduler_id="s", boot_id=7, epoch=2, seq=3, acked=4, plan=plan)


def test_step_plan_decodes() -> None:
    frame = wire.decode(_plan_envelope().SerializeToString())
    plan = frame.body
    assert frame.header == HEADER
    assert isinstance(plan, StepPlan)
    assert plan.step_id == 5
    assert plan.after_idle
    for column, expected in [
        (plan.released_rows, [1]),
        (plan.extend_rows, [0]),
        (plan.extend_blocks, [3]),
        (plan.rows, [0, 2]),
        (plan.num_tokens, [1, 2]),
        (plan.start_positions, [4, 0]),
        (plan.flags, [1, 3]),
        (plan.prefill_token_ids, [11, 12]),
        (plan.slot_mapping, [12, 36, 37]),
        (plan.table_hashes, [0xFFFFFFFF, 10]),
    ]:
        assert column.tolist() == expected
    (admission,) = plan.admissions
    assert (admission.row, admission.block_ids.tolist(), admission.prompt_len) == (2, [9], 2)
    assert admission.token_ids.tolist() == [11, 12]
    assert admission.sampling.seed == 2**64 - 1
    assert (admission.sampling.temperature, admission.sampling.top_k, admission.sampling.top_p) == (0.5, 40, 0.75)


GOLDEN_STEP_PLAN = (
    "08011201731907000000000000002002280330046a870108051204010000001a2b08021204090000001a150d0000003f1028"
    "1d0000403f51ffffffffffffffff20022a080b0000000c0000002204000000002a0403000000320800000000020000003a08"
    "0100000002000000420804000000000000004a02010352080b0000000c0000005a0c0c00000024000000250000006208ffff"
    "ffff0a0000006801"
)


def test_step_plan_golden_bytes() -> None:
    assert _plan_envelope().SerializeToString(deterministic=True).hex() == GOLDEN_STEP_PLAN


GOLDEN_STEP_RESULT = (
    "0801120173190700000000000000200228033004721b0805120808000000090000001a0200012209080a10d00f181e2004"
)


def test_step_result_golden_bytes() -> None:
    result = StepResult(5, np.array([8, 9], np.int32), np.array([0, 1], np.uint8), StepTimings(10, 2000, 30, 4))
    data = wire.encode(HEADER, result)
    assert data.hex() == GOLDEN_STEP_RESULT
    message = pb.Envelope.FromString(data)
    assert np.frombuffer(message.result.token_ids, "<i4").tolist() == [8, 9]
    assert message.result.row_status == b"\0\1"
    timings = message.result.timings
    assert (timings.queued_us, timings.device_us, timings.starved_us, timings.plans_queued) == (10, 2000, 30, 4)
    assert (message.version, message.scheduler_id, message.boot_id) == (1, "s", 7)
    assert (message.epoch, message.seq, message.acked) == (2, 3, 4)


def test_sampling_parameters_decode() -> None:
    envelope = _plan_envelope()
    admission = envelope.plan.admissions[0]
    admission.audit_from = 2
    admission.sampling.CopyFrom(
        pb.RowSampling(
            min_p=0.25,
            repetition_penalty=1.5,
            frequency_penalty=-0.5,
            presence_penalty=2.0,
            bias_token_ids=np.array([7, 8], "<i4").tobytes(),
            bias_values=np.array([0.5, -4.0], "<f4").tobytes(),
            allowed_token_ids=np.array([7], "<i4").tobytes(),
            banned_token_ids=np.array([9, 10], "<i4").tobytes(),
            min_tokens=3,
            stop_token_ids=np.array([11], "<i4").tobytes(),
            grammar="start: /a/",
            num_logprobs=0,
            processed_logprobs=True,
            num_prompt_logprobs=20,
        )
    )
    plan = wire.decode(envelope.SerializeToString()).body
    assert isinstance(plan, StepPlan)
    (decoded,) = plan.admissions
    sampling = decoded.sampling
    assert decoded.audit_from == 2
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (-0.5, 2.0)
    assert (sampling.bias_token_ids.tolist(), sampling.bias_values.tolist()) == ([7, 8], [0.5, -4.0])
    assert sampling.bias_values.dtype == np.float32
    assert (sampling.allowed_token_ids.tolist(), sampling.banned_token_ids.tolist()) == ([7], [9, 10])
    assert (sampling.min_tokens, sampling.stop_token_ids.tolist()) == (3, [11])
    assert sampling.grammar == "start: /a/"
    assert (sampling.num_logprobs, sampling.processed_logprobs, sampling.num_prompt_logprobs) == (0, True, 20)


def test_sampling_parameters_that_are_not_set_are_off() -> None:
    plan = wire.decode(_plan_envelope().SerializeToString()).body
    assert isinstance(plan, StepPlan)
    sampling = plan.admissions[0].sampling
    assert not sampling.has_penalties
    assert (sampling.min_p, sampling.repetition_penalty, sampling.grammar) == (0, 1, "")
    assert sampling.num_logprobs is sampling.num_prompt_logprobs is None


@pytest.mark.parametrize("column", ["bias_token_ids", "bias_values", "allowed_token_ids", "stop_token_ids"])
def test_ragged_sampling_column_is_a_malformed_plan(column: str) -> None:
    envelope = _plan_envelope()
    setattr(envelope.plan.admissions[0].sampling, column, b"\0\0\0\0\0")
    assert isinstance(wire.decode(envelope.SerializeToString()).body, MalformedPlan)


def _columns(count: int) -> LogprobColumns:
    return LogprobColumns(
        logprobs=np.arange(count, dtype=np.float32) / -4,
        ranks=np.arange(1, count + 1, dtype=np.int32),
        top_counts=np.full(count, 1, np.int32),
        top_token_ids=np.arange(count, dtype=np.int32) + 50,
        top_logprobs=np.arange(count, dtype=np.float32) / -8,
    )


def test_step_result_reports() -> None:
    result = StepResult(
        5,
        np.array([8, 9], np.int32),
        logprobs=_columns(2),
        prompt_logprobs=(RowPromptLogprobs(3, 1, _columns(4)), RowPromptLogprobs(0, 7, _columns(1))),
        audited_tokens=6,
        audit_mismatch_rows=np.array([3, 3], np.int32),
        grammar_ended=np.array([0, 1], np.uint8),
    )
    message = pb.Envelope.FromString(wire.encode(HEADER, result)).result
    assert np.frombuffer(message.logprobs.logprobs, "<f4").tolist() == [0, -0.25]
    assert np.frombuffer(message.logprobs.ranks, "<i4").tolist() == [1, 2]
    assert np.frombuffer(message.logprobs.top_counts, "<i4").tolist() == [1, 1]
    assert np.frombuffer(message.logprobs.top_token_ids, "<i4").tolist() == [50, 51]
    assert np.frombuffer(message.logprobs.top_logprobs, "<f4").tolist() == [0, -0.125]
    first, second = message.prompt_logprobs
    assert (first.row, first.start_position, len(first.logprobs.ranks)) == (3, 1, 16)
    assert (second.row, second.start_position, len(second.logprobs.ranks)) == (0, 7, 4)
    assert message.audited_tokens == 6
    assert np.frombuffer(message.audit_mismatch_rows, "<i4").tolist() == [3, 3]
    assert message.grammar_ended == b"\0\1"


def test_step_result_without_reports_has_none() -> None:
    message = pb.Envelope.FromString(wire.encode(HEADER, StepResult(5, np.array([8], np.int32)))).result
    assert not message.HasField("logprobs")
    assert (len(message.prompt_logprobs), message.audited_tokens) == (0, 0)
    assert message.audit_mismatch_rows == message.grammar_ended == b""


def test_hello_carries_the_capacity() -> None:
    capacity = wire.Capacity("e1", "tiny", "ab", "cd", "cpu", "float32", 100, 64, 16, 10, 4, 32)
    hello = pb.Envelope.FromString(wire.encode(HEADER, wire.Hello(2**64 - 1, capacity))).hello
    assert hello.nonce == 2**64 - 1
    assert (hello.executor_id, hello.model) == ("e1", "tiny")
    assert (hello.model_fingerprint, hello.kernel_fingerprint) == ("ab", "cd")
    assert (hello.device, hello.dtype, hello.vocab_size, hello.max_model_len) == ("cpu", "float32", 100, 64)
    assert (hello.block_size, hello.num_blocks, hello.max_rows, hello.max_batched_tokens) == (16, 10, 4, 32)
    assert hello.pipeline_depth == 1


def test_small_bodies() -> None:
    assert pb.Envelope.FromString(wire.encode(HEADER, wire.Ready())).WhichOneof("body") == "ready"
    heartbeat = pb.Envelope.FromString(wire.encode(HEADER, wire.Heartbeat(9, 8))).heartbeat
    assert (heartbeat.last_step, heartbeat.last_settled_step) == (9, 8)
    fault = pb.Envelope.FromString(wire.encode(HEADER, Fault(6, FaultCode.MISMATCH, "x" * 9999))).fault
    assert (fault.step_id, fault.code, len(fault.message)) == (6, pb.FAULT_CODE_MISMATCH, 500)


def test_fault_codes_are_the_wires() -> None:
    assert {code.name: code.value for code in FaultCode} == {
        name.removeprefix("FAULT_CODE_"): value for name, value in pb.FaultCode.items() if value
    }


def test_welcome_and_heartbeat_decode() -> None:
    welcome = pb.Welcome(nonce=1, accepted=True, reject_reason="r", heartbeat_ms=2, lease_ms=3)
    frame = wire.decode(pb.Envelope(version=1, welcome=welcome).SerializeToString())
    assert frame.body == wire.Welcome(1, True, "r", 2, 3)
    heartbeat = pb.Envelope(version=1, heartbeat=pb.Heartbeat(last_step=4, last_settled_step=3))
    assert wire.decode(heartbeat.SerializeToString()).body == wire.Heartbeat(4, 3)


def test_unknown_bodies_have_no_body() -> None:
    assert wire.decode(pb.Envelope(version=1).SerializeToString()).body is None


def test_ragged_column_is_a_malformed_plan() -> None:
    envelope = pb.Envelope(version=1, plan=pb.StepPlan(step_id=3, rows=b"\0\0\0"))
    body = wire.decode(envelope.SerializeToString()).body
    assert isinstance(body, MalformedPlan)
    assert body.step_id == 3


def test_other_versions_and_garbage_are_refused() -> None:
    with pytest.raises(wire.VersionError):
        wire.decode(pb.Envelope(version=2).SerializeToString())
    with pytest.raises(wire.WireError):
        wire.decode(b"\xff\xff\xff")
