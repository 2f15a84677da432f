"""Sessions with executors, frame by frame, without sockets or clocks."""

import numpy as np

from baton_protos import execution_pb2 as pb
from scheduler_service.core.step_plan import StepPlan
from scheduler_service.engine.executor_registry import ExecutorJoined, ExecutorLost, ExecutorRegistry, StepFinished

PEER = b"peer"


def hello(nonce: int = 1, boot_id: int = 7, executor_id: str = "e", **capacity: object) -> bytes:
    fields: dict[str, object] = {
        "model_fingerprint": "abc",
        "vocab_size": 100,
        "max_model_len": 64,
        "block_size": 4,
        "num_blocks": 8,
        "max_rows": 4,
        "max_batched_tokens": 16,
    }
    body = pb.Hello(nonce=nonce, executor_id=executor_id, **{**fields, **capacity})
    return pb.Envelope(version=1, boot_id=boot_id, hello=body).SerializeToString()


def frame(body: dict[str, object], epoch: int = 1, boot_id: int = 7, acked: int = 0, scheduler: str = "s") -> bytes:
    envelope = pb.Envelope(version=1, scheduler_id=scheduler, boot_id=boot_id, epoch=epoch, acked=acked, **body)
    return envelope.SerializeToString()


def sent(registry: ExecutorRegistry) -> list[pb.Envelope]:
    envelopes = [pb.Envelope.FromString(outgoing.frame) for outgoing in registry.outgoing]
    registry.outgoing.clear()
    return envelopes


def plan(step_id: int) -> StepPlan:
    none = np.zeros(0, np.int32)
    return StepPlan(
        step_id,
        none,
        (),
        none,
        none,
        none,
        none,
        none,
        np.zeros(0, np.uint8),
        none,
        none,
        np.zeros(0, np.uint32),
        False,
    )


def joined() -> ExecutorRegistry:
    registry = ExecutorRegistry("s", lease=2.0)
    registry.receive(PEER, hello(), 0.0)
    events = registry.receive(PEER, frame({"ready": pb.Ready()}), 0.0)
    assert isinstance(events[0], ExecutorJoined)
    registry.outgoing.clear()
    return registry


def result(step_id: int) -> dict[str, object]:
    return {"result": pb.StepResult(step_id=step_id)}


def heartbeat(last_step: int) -> dict[str, object]:
    return {"heartbeat": pb.Heartbeat(last_step=last_step)}


def test_a_repeated_hello_gets_the_same_welcome() -> None:
    registry = ExecutorRegistry("s", lease=2.0)
    for _ in range(2):
        assert registry.receive(PEER, hello(nonce=5), 0.0) == []
    welcomes = sent(registry)
    assert [(w.epoch, w.welcome.nonce, w.welcome.accepted) for w in welcomes] == [(1, 5, True)] * 2


def test_a_restarted_executor_loses_its_old_session() -> None:
    registry = joined()
    events = registry.receive(b"other", hello(nonce=2, boot_id=8), 1.0)
    assert isinstance(events[0], ExecutorLost)
    assert sent(registry)[0].epoch == 2
    assert registry.receive(PEER, frame(result(1)), 1.0) == []
    assert registry.dropped["foreign frame"] == 1


def test_frames_of_other_epochs_incarnations_and_schedulers_are_fenced_off() -> None:
    registry = joined()
    for foreign in (frame(result(1), epoch=2), frame(result(1), boot_id=9), frame(result(1), scheduler="x")):
        assert registry.receive(PEER, foreign, 0.0) == []
    assert registry.receive(b"stranger", frame(result(1)), 0.0) == []
    assert registry.dropped["foreign frame"] == 4


def test_results_are_taken_once_and_in_order() -> None:
    registry = joined()
    assert registry.receive(PEER, frame(result(2)), 0.0) == []
    assert isinstance(registry.receive(PEER, frame(result(1)), 0.0)[0], StepFinished)
    assert registry.receive(PEER, frame(result(1)), 0.0) == []
    assert isinstance(registry.receive(PEER, frame(result(2)), 0.0)[0], StepFinished)


def test_a_lost_plan_is_sent_again() -> None:
    registry = joined()
    for step_id in (1, 2, 3):
        registry.dispatch("e", plan(step_id))
    assert [e.plan.step_id for e in sent(registry)] == [1, 2, 3]
    registry.receive(PEER, frame(heartbeat(1), acked=1), 0.1)
    assert sent(registry) == []  # they may be on their way
    registry.receive(PEER, frame(heartbeat(1), acked=1), 0.35)
    assert [e.plan.step_id for e in sent(registry)] == [2, 3]
    registry.receive(PEER, frame(heartbeat(3), acked=3), 0.6)
    registry.receive(PEER, frame(heartbeat(3), acked=3), 0.85)
    assert sent(registry) == []


def test_silence_ends_the_session() -> None:
    registry = joined()
    assert registry.tick(1.0) == []
    assert [e.WhichOneof("body") for e in sent(registry)] == ["heartbeat"]
    assert isinstance(registry.tick(2.5)[0], ExecutorLost)
    assert registry.tick(3.0) == []


def test_a_vanished_peer_ends_the_session() -> None:
    registry = joined()
    assert isinstance(registry.unreachable(PEER)[0], ExecutorLost)
    assert registry.unreachable(PEER) == []


def test_a_fault_ends_the_session() -> None:
    registry = joined()
    fault = pb.Fault(step_id=3, code=pb.FAULT_CODE_MISMATCH, message="slots")
    event = registry.receive(PEER, frame({"fault": fault}), 0.0)[0]
    assert event == ExecutorLost("e", "MISMATCH in step 3: slots")


def test_executors_that_cannot_be_used_are_told_why() -> None:
    registry = joined()
    for body, word in (
        (hello(executor_id="x", num_blocks=0), "num_blocks"),
        (hello(executor_id="x", max_batched_tokens=3), "max_batched_tokens"),
        (hello(executor_id="x" * 200), "executor_id"),
        (hello(executor_id="x", model_fingerprint="other"), "model"),
    ):
        registry.receive(b"x", body, 0.0)
        welcome = sent(registry)[0].welcome
        assert not welcome.accepted and word in welcome.reject_reason


def test_garbage_is_counted_and_harmless() -> None:
    registry = joined()
    for garbage in (b"", b"\xff" * 40, pb.Envelope(version=9).SerializeToString(), frame({})):
        assert registry.receive(PEER, garbage, 0.0) == []
    assert sum(registry.dropped.values()) == 4


def test_the_fingerprint_names_model_and_kernels() -> None:
    registry = ExecutorRegistry("s", lease=2.0)
    assert registry.fingerprint == ""
    for number, kernels in enumerate(("avx512", "avx512", "reference")):
        name = f"e{number}"
        registry.receive(name.encode(), hello(executor_id=name, kernel_fingerprint=kernels), 0.0)
        registry.receive(name.encode(), frame({"ready": pb.Ready()}), 0.0)
    first = registry.fingerprint
    assert first.startswith("abc-")
    other = ExecutorRegistry("s", lease=2.0)
    other.receive(PEER, hello(kernel_fingerprint="reference"), 0.0)
    other.receive(PEER, frame({"ready": pb.Ready()}), 0.0)
    assert other.fingerprint != first
