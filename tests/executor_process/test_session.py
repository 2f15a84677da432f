"""The session logic alone: frames in, frames out, time as a number."""

import numpy as np
import pytest

from baton_protos import execution_pb2 as pb
from executor_service.inbox import MAX_QUEUED_PLANS, Inbox, NewEpoch, PlanArrival, Stop
from executor_service.session import EXIT_REJECTED, Session
from executor_service.step_plan import Fault, FaultCode, MalformedPlan, StepResult
from executor_service.wire import Capacity

BOOT = 77
CAPACITY = Capacity("e1", "tiny", "ab", "cd", "cpu", "float32", 100, 64, 16, 10, 4, 32)


class Peer:
    """A session, and the scheduler's frames to it. Heartbeats every 0.1 s, lease 1 s."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.session = Session(CAPACITY, BOOT, self.inbox, 0.0)

    def sent(self) -> list[pb.Envelope]:
        frames = [pb.Envelope.FromString(frame) for frame in self.session.outgoing]
        self.session.outgoing.clear()
        return frames

    def kinds(self) -> list[str | None]:
        return [frame.WhichOneof("body") for frame in self.sent()]

    def hello(self) -> pb.Envelope:
        (frame,) = self.sent()
        assert frame.WhichOneof("body") == "hello"
        return frame

    def receive(self, now: float = 0.0, *, epoch: int = 1, scheduler_id: str = "s", **body: object) -> None:
        fields = {"version": 1, "boot_id": BOOT, "acked": 0} | body
        envelope = pb.Envelope(scheduler_id=scheduler_id, epoch=epoch, **fields)  # type: ignore[arg-type]
        self.session.receive(envelope.SerializeToString(), now)

    def welcome(self, nonce: int, now: float = 0.0, *, epoch: int = 1, scheduler_id: str = "s") -> None:
        welcome = pb.Welcome(nonce=nonce, accepted=True, heartbeat_ms=100, lease_ms=1000)
        self.receive(now, epoch=epoch, scheduler_id=scheduler_id, welcome=welcome)

    def plans(self) -> list[int]:
        """Step ids in the inbox."""
        ids = []
        while len(self.inbox):
            item = self.inbox.take()
            if isinstance(item, PlanArrival):
                ids.append(item.plan.step_id)
        return ids


@pytest.fixture
def peer() -> Peer:
    """In epoch 1, ready, nothing sent or queued."""
    peer = Peer()
    peer.welcome(peer.hello().hello.nonce)
    assert peer.inbox.take() == NewEpoch(1)
    peer.session.ready(1)
    assert peer.kinds() == ["ready"]
    return peer


def result(step_id: int) -> StepResult:
    return StepResult(step_id, np.array([step_id], np.int32))


def plan(step_id: int) -> pb.StepPlan:
    return pb.StepPlan(step_id=step_id)


def test_hello_is_repeated_with_backoff_and_the_same_nonce() -> None:
    peer = Peer()
    first = peer.hello()
    assert (first.epoch, first.scheduler_id, first.boot_id) == (0, "", BOOT)
    times = []
    now = 0.0
    while len(times) < 6:
        now = peer.session.deadline
        peer.session.tick(now)
        assert peer.hello().hello.nonce == first.hello.nonce
        times.append(now)
    assert times == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.6])


def test_hellos_do_not_pile_up_without_a_connection() -> None:
    peer = Peer()
    for _ in range(50):
        peer.session.tick(peer.session.deadline)
    assert peer.kinds() == ["hello"]


def test_welcome_of_another_nonce_is_dropped() -> None:
    peer = Peer()
    peer.welcome(peer.hello().hello.nonce ^ 1)
    assert len(peer.inbox) == 0
    assert peer.session.dropped == {"stale welcome": 1}


def test_refusal_stops_the_process() -> None:
    peer = Peer()
    nonce = peer.hello().hello.nonce
    peer.receive(welcome=pb.Welcome(nonce=nonce, accepted=False, reject_reason="other weights"))
    assert peer.inbox.take() == Stop(EXIT_REJECTED, "the scheduler refuses this executor: other weights")


def test_repeated_welcome_repeats_ready_until_plans_come(peer: Peer) -> None:
    nonce = peer.session._nonce
    peer.welcome(nonce)
    assert peer.kinds() == ["ready"]
    peer.receive(plan=plan(1))
    peer.welcome(nonce)
    assert peer.kinds() == []
    assert peer.plans() == [1]


def test_scheduler_may_restart_the_session_by_itself(peer: Peer) -> None:
    peer.receive(plan=plan(1))
    peer.welcome(peer.session._nonce, epoch=2)
    assert peer.inbox.take() == NewEpoch(2)  # the plan of epoch 1 is gone
    assert len(peer.inbox) == 0
    peer.session.ready(1)
    assert peer.kinds() == []
    peer.session.ready(2)
    (ready,) = peer.sent()
    assert (ready.epoch, ready.scheduler_id) == (2, "s")


def test_foreign_frames_are_dropped_and_do_not_count_as_life(peer: Peer) -> None:
    peer.receive(0.9, plan=plan(1), epoch=2)
    peer.receive(0.9, plan=plan(1), scheduler_id="t")
    peer.receive(0.9, plan=plan(1), boot_id=BOOT + 1)
    assert peer.session.dropped == {"foreign frame": 3}
    assert peer.plans() == []
    peer.session.tick(1.0)
    assert peer.kinds() == ["hello"]


def test_undecodable_frames_are_counted(peer: Peer) -> None:
    peer.session.receive(b"\xff\xff", 0.0)
    peer.receive(version=2, plan=plan(1))
    peer.receive()
    assert peer.session.dropped == {"undecodable frame": 1, "other protocol version": 1, "frame of an unknown kind": 1}


def test_plans_are_taken_in_order(peer: Peer) -> None:
    for step_id in (1, 2, 2, 1):
        peer.receive(plan=plan(step_id))
    assert peer.plans() == [1, 2]
    assert peer.session.dropped == {"repeated plan": 2}


def test_plans_after_a_gap_wait_to_be_sent_again(peer: Peer) -> None:
    for step_id in (1, 3, 4):
        peer.receive(plan=plan(step_id))
    assert peer.plans() == [1]
    (heartbeat,) = peer.sent()  # told at once, and once
    assert (heartbeat.heartbeat.last_step, heartbeat.acked) == (1, 1)
    for step_id in (2, 3, 4):
        peer.receive(plan=plan(step_id))
    assert peer.plans() == [2, 3, 4]
    peer.receive(plan=plan(6))
    assert peer.kinds() == ["heartbeat"]


def test_malformed_plan_is_delivered_as_such(peer: Peer) -> None:
    peer.receive(plan=pb.StepPlan(step_id=1, rows=b"x"))
    item = peer.inbox.take()
    assert isinstance(item, PlanArrival)
    assert isinstance(item.plan, MalformedPlan)


def test_plan_over_a_full_queue_counts_as_lost(peer: Peer) -> None:
    for step_id in range(1, MAX_QUEUED_PLANS + 2):
        peer.receive(plan=plan(step_id))
    peer.session.tick(0.1)
    assert peer.sent()[-1].acked == MAX_QUEUED_PLANS
    assert len(peer.plans()) == MAX_QUEUED_PLANS
    peer.receive(plan=plan(MAX_QUEUED_PLANS + 1))
    assert peer.plans() == [MAX_QUEUED_PLANS + 1]


def test_heartbeats_carry_progress(peer: Peer) -> None:
    peer.receive(plan=plan(1))
    peer.receive(plan=plan(2))
    peer.session.result(1, result(1), 0.0)
    peer.sent()
    assert peer.session.deadline == pytest.approx(0.1)
    peer.session.tick(0.1)
    (frame,) = peer.sent()
    assert (frame.heartbeat.last_step, frame.heartbeat.last_settled_step, frame.acked) == (2, 1, 2)
    assert (frame.epoch, frame.scheduler_id, frame.boot_id) == (1, "s", BOOT)
    assert peer.session.deadline == pytest.approx(0.2)


def test_results_are_resent_until_acknowledged(peer: Peer) -> None:
    for step_id in (1, 2, 3):
        peer.session.result(1, result(step_id), 0.0)
    peer.sent()
    peer.receive(0.05, heartbeat=pb.Heartbeat())
    assert peer.kinds() == []  # not overdue yet
    peer.receive(0.2, acked=1, heartbeat=pb.Heartbeat())
    assert [frame.result.step_id for frame in peer.sent()] == [2, 3]
    peer.receive(0.25, heartbeat=pb.Heartbeat())
    assert peer.kinds() == []  # just resent
    peer.receive(0.4, heartbeat=pb.Heartbeat(last_settled_step=3))
    assert peer.kinds() == []


def test_unacknowledged_results_are_bounded(peer: Peer) -> None:
    for step_id in range(1, 101):
        peer.session.result(1, result(step_id), 0.0)
        peer.sent()
    peer.receive(0.2, heartbeat=pb.Heartbeat())
    assert [frame.result.step_id for frame in peer.sent()] == list(range(37, 101))


def test_outgoing_frames_are_bounded(peer: Peer) -> None:
    for step_id in range(1, 1001):
        peer.session.result(1, result(step_id), 0.0)
    assert len(peer.session.outgoing) <= 128


def test_silent_scheduler_is_given_up(peer: Peer) -> None:
    nonce = peer.session._nonce
    peer.receive(0.5, heartbeat=pb.Heartbeat())
    peer.receive(0.5, plan=plan(1))
    peer.session.result(1, result(1), 0.5)
    peer.session.tick(1.45)
    peer.sent()
    peer.session.tick(1.5)
    assert peer.plans() == []
    hello = peer.hello()
    assert hello.hello.nonce != nonce
    assert (hello.epoch, hello.scheduler_id, hello.acked) == (0, "", 0)
    peer.session.result(1, result(2), 1.6)
    assert peer.kinds() == []  # of an epoch that is over
    peer.receive(1.6, plan=plan(2))
    assert peer.plans() == []
    peer.welcome(hello.hello.nonce, 1.7, epoch=1, scheduler_id="restarted")
    assert peer.inbox.take() == NewEpoch(2)
    peer.session.result(1, result(2), 1.8)
    assert peer.kinds() == []  # of another scheduler's epoch 1


def test_fault_is_told_before_the_next_hello(peer: Peer) -> None:
    peer.receive(plan=plan(1))
    peer.receive(plan=plan(2))
    peer.session.result(1, result(1), 0.0)
    peer.session.fault(1, Fault(2, FaultCode.MISMATCH, "why"), 0.0)
    frames = peer.sent()
    assert [frame.WhichOneof("body") for frame in frames] == ["result", "fault", "hello"]
    assert (frames[1].epoch, frames[1].fault.code) == (1, pb.FAULT_CODE_MISMATCH)
    assert frames[2].epoch == 0
    assert peer.plans() == []
    peer.receive(plan=plan(3))
    assert peer.plans() == []
    peer.welcome(frames[2].hello.nonce, epoch=2)
    assert peer.inbox.take() == NewEpoch(2)


def test_drain_is_asked_for_until_granted(peer: Peer) -> None:
    peer.session.drain()
    assert peer.kinds() == ["drain"]
    peer.session.tick(0.1)
    assert peer.kinds() == ["heartbeat", "drain"]
    peer.receive(0.15, plan=plan(1))
    assert peer.plans() == [1]  # what is under way is finished
    peer.receive(0.2, drain=pb.Drain())
    assert peer.inbox.take() == Stop(0, "this executor was drained: the scheduler let it go")


def test_drain_ends_at_once_where_nobody_has_work(peer: Peer) -> None:
    peer.session.drain()
    peer.session.tick(1.0)  # the lease is over
    assert isinstance(peer.inbox.take(), Stop)
    alone = Peer()
    alone.session.drain()
    assert isinstance(alone.inbox.take(), Stop)


def test_an_order_to_leave_ends_the_process(peer: Peer) -> None:
    peer.receive(drain=pb.Drain())
    assert peer.inbox.take() == Stop(0, "this executor was drained: the scheduler let it go")


def test_a_redirect_ends_the_session_only(peer: Peer) -> None:
    peer.session.ask_to_move("tcp://b:1")
    (wish,) = peer.sent()
    assert wish.drain.redirect == "tcp://b:1"
    assert not peer.session.is_seeking(0.1)
    peer.receive(0.1, drain=pb.Drain(redirect="tcp://b:1"))
    assert peer.session.is_seeking(0.1)
    assert peer.session.take_redirect() == "tcp://b:1"
    assert peer.session.take_redirect() == ""
    peer.welcome(peer.hello().hello.nonce, 0.2, scheduler_id="b")
    assert peer.inbox.take() == NewEpoch(2)


def test_after_a_fault_the_executor_stays_with_its_scheduler_for_a_lease(peer: Peer) -> None:
    peer.session.fault(1, Fault(2, FaultCode.DEVICE_ERROR, "why"), 0.0)
    assert not peer.session.is_seeking(0.9)
    assert peer.session.is_seeking(1.0)


def test_fault_of_an_earlier_epoch_is_ignored(peer: Peer) -> None:
    peer.session.fault(0, Fault(2, FaultCode.MISMATCH, "why"), 0.0)
    assert peer.kinds() == []
