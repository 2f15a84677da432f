"""Sessions with executors, frame by frame, without sockets or clocks."""

import numpy as np
import pytest

from baton_protos import execution_pb2 as pb
from scheduler_service.core.step_plan import StepPlan
from scheduler_service.engine.executor_registry import ExecutorRegistry
from scheduler_service.engine.executor_session import (
    ExecutorJoined,
    ExecutorLeaving,
    ExecutorLost,
    Loss,
    Probed,
    StepFinished,
)

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


def timed_result(step_id: int, seconds: float) -> dict[str, object]:
    return {"result": pb.StepResult(step_id=step_id, timings=pb.StepTimings(device_us=round(seconds * 1e6)))}


def ticked_until_lost(registry: ExecutorRegistry, now: float) -> float:
    """When the session ends although heartbeats go on."""
    while registry.sessions:
        now += 0.25
        registry.receive(PEER, frame(heartbeat(registry.sessions["e"].dispatched)), now)
        registry.tick(now)
        assert now < 100.0
    return now


def heartbeat(last_step: int, answered: int = 0) -> dict[str, object]:
    return {"heartbeat": pb.Heartbeat(last_step=last_step, last_settled_step=answered)}


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
    for step_id in (1, 2):
        registry.dispatch("e", plan(step_id), 0.0)
    assert registry.receive(PEER, frame(result(2)), 0.0) == []
    assert isinstance(registry.receive(PEER, frame(result(1)), 0.0)[0], StepFinished)
    assert registry.receive(PEER, frame(result(1)), 0.0) == []
    assert isinstance(registry.receive(PEER, frame(result(2)), 0.0)[0], StepFinished)


def test_a_result_that_no_plan_asked_for_is_dropped() -> None:
    registry = ExecutorRegistry("s", lease=2.0)
    registry.receive(PEER, hello(), 0.0)
    assert registry.receive(PEER, frame(result(1)), 0.0) == []  # before it is ready, and known to the cluster
    registry.receive(PEER, frame({"ready": pb.Ready()}), 0.0)
    assert registry.receive(PEER, frame(result(1)), 0.0) == []
    registry.dispatch("e", plan(1), 0.0)
    assert isinstance(registry.receive(PEER, frame(result(1)), 0.0)[0], StepFinished)


def test_a_lost_plan_is_sent_again() -> None:
    registry = joined()
    for step_id in (1, 2, 3):
        registry.dispatch("e", plan(step_id), 0.0)
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
    assert event == ExecutorLost("e", "MISMATCH in step 3: slots")  # which it never got


@pytest.mark.parametrize(("named", "faulty"), [(0, None), (1, None), (2, 2), (3, 3), (4, None)])
def test_a_fault_names_the_step_if_it_is_in_flight(named: int, faulty: int | None) -> None:
    registry = joined()
    for step_id in (1, 2, 3):
        registry.dispatch("e", plan(step_id), 0.0)
    registry.receive(PEER, frame(result(1)), 0.0)
    fault = pb.Fault(step_id=named, code=pb.FAULT_CODE_DEVICE_ERROR)
    (event,) = registry.receive(PEER, frame({"fault": fault}), 0.0)
    assert isinstance(event, ExecutorLost) and event.faulty_step == faulty


def test_executors_that_cannot_be_used_are_told_why() -> None:
    registry = joined()
    for body, word in (
        (hello(executor_id="x", num_blocks=0), "num_blocks"),
        (hello(executor_id="x", num_blocks=1 << 20, block_size=2048), "num_blocks"),
        (hello(executor_id="x", num_blocks=1 << 25), "num_blocks"),
        (hello(executor_id="x", max_rows=65_536, max_batched_tokens=65_536, max_model_len=1 << 20), "max_model_len"),
        (hello(executor_id="x", max_batched_tokens=3), "max_batched_tokens"),
        (hello(executor_id="x" * 200), "executor_id"),
        (hello(executor_id="x", model_fingerprint="other"), "model"),
    ):
        registry.receive(b"x", body, 0.0)
        welcome = sent(registry)[0].welcome
        assert not welcome.accepted and word in welcome.reject_reason


def test_an_executor_may_be_turned_away_once_it_is_ready() -> None:
    registry = joined()
    registry.refuse("e", "no room")
    welcome = sent(registry)[-1].welcome
    assert (welcome.accepted, welcome.reject_reason) == (False, "no room")
    assert not registry.sessions


def test_of_two_models_that_come_at_once_the_second_is_refused() -> None:
    registry = ExecutorRegistry("s", lease=2.0)
    registry.receive(PEER, hello(), 0.0)
    registry.receive(b"x", hello(executor_id="x", boot_id=8, model_fingerprint="other"), 0.0)
    assert all(envelope.welcome.accepted for envelope in sent(registry))
    assert isinstance(registry.receive(PEER, frame({"ready": pb.Ready()}), 0.0)[0], ExecutorJoined)
    assert registry.receive(b"x", frame({"ready": pb.Ready()}, boot_id=8), 0.0) == []
    welcome = sent(registry)[0].welcome
    assert not welcome.accepted and "model" in welcome.reject_reason
    assert list(registry.sessions) == ["e"]


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


def test_a_step_that_does_not_end_ends_the_session() -> None:
    registry = joined()
    registry.dispatch("e", plan(1), 10.0)
    now = 10.0
    while now < 39.5:  # nothing is known of its steps yet
        registry.receive(PEER, frame(heartbeat(1), acked=1), now)
        assert registry.tick(now) == []
        now += 0.25
    registry.receive(PEER, frame(heartbeat(1), acked=1), 40.1)
    assert isinstance(registry.tick(40.5)[0], ExecutorLost)
    assert registry.losses[Loss.STUCK] == 1


def test_a_plan_that_does_not_arrive_is_no_stuck_step() -> None:
    """Nothing reaches the executor, and its heartbeats come."""
    registry = joined()
    registry.dispatch("e", plan(1), 10.0)
    registry.receive(PEER, frame(timed_result(1, seconds=0.01)), 10.1)
    registry.dispatch("e", plan(2), 10.1)
    now = 10.1
    while not (events := registry.tick(now)):
        registry.receive(PEER, frame(heartbeat(1), acked=1), now)
        now += 0.25
    assert isinstance(events[0], ExecutorLost)
    assert now == pytest.approx(13.25, abs=0.3)
    assert registry.losses == {Loss.LEASE: 1}


def test_a_result_that_does_not_arrive_is_no_stuck_step() -> None:
    """A result is lost, the executor never hears that it has to be sent again, and its heartbeats come."""
    registry = joined()
    registry.dispatch("e", plan(1), 10.0)
    registry.receive(PEER, frame(timed_result(1, seconds=0.01)), 10.1)
    registry.dispatch("e", plan(2), 10.1)
    now = 10.1
    while not (events := registry.tick(now)):
        registry.receive(PEER, frame(heartbeat(2, answered=2), acked=2), now)
        now += 0.25
    assert isinstance(events[0], ExecutorLost)
    assert registry.losses == {Loss.LEASE: 1}


def test_a_stuck_step_is_found_sooner_once_its_kind_is_known() -> None:
    registry = joined()
    registry.dispatch("e", plan(1), 10.0)
    registry.receive(PEER, frame(timed_result(1, seconds=0.01)), 10.1)
    registry.dispatch("e", plan(2), 10.1)
    assert ticked_until_lost(registry, 10.1) == pytest.approx(13.25, abs=0.3)


def test_slow_steps_are_given_their_time() -> None:
    registry = joined()
    registry.dispatch("e", plan(1), 10.0)
    registry.receive(PEER, frame(timed_result(1, seconds=2.0)), 12.0)
    registry.dispatch("e", plan(2), 12.0)
    assert ticked_until_lost(registry, 12.0) == pytest.approx(32.25, abs=0.3)


def test_a_broken_connection_is_looked_into_at_once() -> None:
    registry = joined()
    registry.tick(1.0)
    sent(registry)
    assert registry.tick(1.05) == []
    assert sent(registry) == []
    registry.suspect(1.06)
    assert registry.next_tick == 1.06
    registry.tick(1.06)
    registry.tick(1.08)
    assert [e.WhichOneof("body") for e in sent(registry)] == ["heartbeat"] * 2
    registry.tick(1.2)
    assert registry.next_tick == pytest.approx(1.45)


def test_an_executor_that_does_not_know_of_its_loss_gets_a_new_session() -> None:
    registry = joined()
    registry.unreachable(PEER)
    assert registry.receive(PEER, frame(result(1)), 1.0) == []
    (welcome,) = sent(registry)
    assert (welcome.epoch, welcome.welcome.nonce, welcome.welcome.accepted) == (2, 1, True)
    assert registry.receive(PEER, frame(result(1)), 1.0) == []  # of the old session
    assert sent(registry) == []
    assert isinstance(registry.receive(PEER, frame({"ready": pb.Ready()}, epoch=2), 1.1)[0], ExecutorJoined)


def test_a_dead_incarnation_gets_none() -> None:
    registry = joined()
    registry.unreachable(PEER)
    for foreign in (frame(result(1), boot_id=9), frame(result(1), epoch=2), frame(result(1), scheduler="x")):
        registry.receive(PEER, foreign, 1.0)
    registry.receive(b"new", hello(nonce=2, boot_id=8), 1.0)
    sent(registry)
    registry.receive(PEER, frame(result(1)), 1.0)
    assert sent(registry) == []


def test_an_executor_that_wants_to_leave_is_let_go_when_it_holds_nothing() -> None:
    registry = joined()
    (event,) = registry.receive(PEER, frame({"drain": pb.Drain()}), 1.0)
    assert event == ExecutorLeaving("e", "")
    assert registry.receive(PEER, frame({"drain": pb.Drain()}), 1.25) == []  # said again
    assert registry.leaving() == ["e"]
    registry.release("e")
    (farewell,) = sent(registry)
    assert (farewell.WhichOneof("body"), farewell.epoch, farewell.drain.redirect) == ("drain", 1, "")
    assert registry.sessions == {} and not registry.losses
    assert registry.receive(PEER, frame(heartbeat(0)), 1.3) == []
    assert sent(registry) == []


def test_an_executor_without_work_may_leave_before_it_is_ready() -> None:
    registry = ExecutorRegistry("s", lease=2.0)
    registry.receive(PEER, hello(), 0.0)
    sent(registry)
    assert registry.receive(PEER, frame({"drain": pb.Drain()}), 0.1) == []
    assert [e.WhichOneof("body") for e in sent(registry)] == ["drain"]


def test_one_executor_at_a_time_may_go_to_another_scheduler_and_never_the_last() -> None:
    registry = joined()
    wish = {"drain": pb.Drain(redirect="tcp://b:1")}
    assert registry.receive(PEER, frame(wish), 1.0) == []
    for name in ("f", "g"):
        registry.receive(name.encode(), hello(executor_id=name), 1.0)
        registry.receive(name.encode(), frame({"ready": pb.Ready()}), 1.0)
    sent(registry)
    assert registry.receive(PEER, frame(wish), 1.1) == [ExecutorLeaving("e", "tcp://b:1")]
    assert registry.receive(b"f", frame(wish), 1.1) == []
    registry.release("e")
    (farewell,) = sent(registry)
    assert farewell.drain.redirect == "tcp://b:1"
    assert registry.receive(b"f", frame(wish), 1.2) == [ExecutorLeaving("f", "tcp://b:1")]
    registry.release("f")
    assert registry.receive(b"g", frame(wish), 1.3) == []


def test_probes_are_answered_with_what_is_there() -> None:
    registry = joined()
    probe = pb.Envelope(version=1, boot_id=11, probe=pb.Probe(nonce=5)).SerializeToString()
    (event,) = registry.receive(b"seeker", probe, 1.0)
    assert event == Probed(b"seeker", 11, 5)
    registry.send_census(event, queued_requests=3)
    (census,) = sent(registry)
    assert (census.census.nonce, census.census.executors, census.census.queued_requests) == (5, 1, 3)
    assert (census.boot_id, census.scheduler_id) == (11, "")
