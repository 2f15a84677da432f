"""The link and the main loop over a real socket, in a real process, with arithmetic for a model."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton_protos import execution_pb2 as pb
from tests.executor_process.scheduler_stub import PlanMaker, SchedulerStub, int32s, tokens
from tests.executor_process.stub_executor import (
    EXHAUSTS_MEMORY,
    IS_NOT_FINITE,
    RAISES,
    SLEEP_SECONDS,
    SLEEPS,
    next_token,
)

GREEDY = pb.RowSampling(top_p=1.0)
ROOT = Path(__file__).parents[2]


def start(endpoint: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.executor_process.stub_executor", endpoint]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def lone_scheduler() -> Iterator[SchedulerStub]:
    """A scheduler for a test that ends its executor."""
    scheduler = SchedulerStub()
    yield scheduler
    scheduler.close()


@pytest.fixture
def executor(lone_scheduler: SchedulerStub) -> Iterator[subprocess.Popen[str]]:
    process = start(lone_scheduler.endpoint)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def shared_scheduler() -> Iterator[SchedulerStub]:
    """With one executor for the whole module: starting one takes seconds, a new epoch milliseconds."""
    scheduler = SchedulerStub()
    process = start(scheduler.endpoint)
    scheduler.welcome()
    yield scheduler
    scheduler.close()
    process.kill()
    process.communicate()


@pytest.fixture
def scheduler(shared_scheduler: SchedulerStub) -> SchedulerStub:
    """In a fresh epoch."""
    shared_scheduler.restart()
    return shared_scheduler


def run_one_request(scheduler: SchedulerStub, maker: PlanMaker, row: int = 0) -> None:
    """A prefill and one decode, checked."""
    scheduler.send_plan(maker.plan(admit={row: ([3], GREEDY)}, prefill={row: [5, 6]}))
    scheduler.send_plan(maker.plan(decode=[row]))
    first = next_token(6, 2)
    assert tokens(scheduler.result(maker.step_id - 1)) == [first]
    assert tokens(scheduler.result(maker.step_id)) == [next_token(first, 3)]


def assert_fault(scheduler: SchedulerStub, code: int, match: str) -> pb.Fault:
    fault = scheduler.receive("fault").fault
    assert fault.code == code
    assert match in fault.message
    return fault


def test_hello_ready_and_routing_id(scheduler: SchedulerStub) -> None:
    assert scheduler.hello.executor_id == "stub-executor"
    assert scheduler.peer == b"stub-executor" + scheduler.boot_id.to_bytes(8, "big")


def test_rows_decode_from_their_own_last_token_ahead_of_results(scheduler: SchedulerStub) -> None:
    maker = PlanMaker()
    scheduler.send_plan(maker.plan(admit={0: ([3], GREEDY), 5: ([9], GREEDY)}, prefill={0: [1, 2], 5: [8]}))
    for decode in ([0, 5], [5, 0], [5]):
        scheduler.send_plan(maker.plan(decode=decode))
    a, b = [next_token(2, 2)], [next_token(8, 1)]
    assert tokens(scheduler.result(1)) == [a[0], b[0]]
    a.append(next_token(a[0], 3))
    b.append(next_token(b[0], 2))
    assert tokens(scheduler.result(2)) == [a[1], b[1]]
    a.append(next_token(a[1], 4))
    b.append(next_token(b[1], 3))
    assert tokens(scheduler.result(3)) == [b[2], a[2]]
    assert tokens(scheduler.result(4)) == [next_token(b[2], 4)]


def test_heartbeats_and_timings_of_a_long_step(scheduler: SchedulerStub) -> None:
    maker = PlanMaker()
    scheduler.send_plan(maker.plan(admit={0: ([3], GREEDY)}, prefill={0: [SLEEPS]}))
    for _ in range(3):
        scheduler.send_plan(maker.plan(decode=[0]))
    sent_at = time.monotonic()
    first = scheduler.result(1).timings
    during = [at for at, heartbeat in scheduler.heartbeats if sent_at < at < sent_at + SLEEP_SECONDS]
    assert len(during) >= 0.6 * SLEEP_SECONDS * 1e3 / scheduler.heartbeat_ms
    assert scheduler.heartbeats[-1][1].last_step == 4
    assert first.device_us >= SLEEP_SECONDS * 1e6 * 0.9
    assert first.starved_us == 0  # the first plan of an epoch
    second, third = scheduler.result(2).timings, scheduler.result(3).timings
    assert second.queued_us >= SLEEP_SECONDS * 1e6 * 0.5
    assert (second.starved_us, second.plans_queued, third.plans_queued) == (0, 2, 1)
    scheduler.result(4)
    time.sleep(0.2)
    scheduler.send_plan(maker.plan(decode=[0], extend=[(0, 4)]))
    assert scheduler.result(5).timings.starved_us >= 150_000
    time.sleep(0.2)
    scheduler.send_plan(maker.plan(decode=[0], after_idle=True))
    assert scheduler.result(6).timings.starved_us == 0


def test_bad_row_is_reported_and_the_step_goes_on(scheduler: SchedulerStub) -> None:
    maker = PlanMaker()
    prefill = {0: [1], 1: [IS_NOT_FINITE], 2: [3]}
    scheduler.send_plan(maker.plan(admit={row: ([row], GREEDY) for row in prefill}, prefill=prefill))
    result = scheduler.result(1)
    assert result.row_status == bytes([0, 1, 0])
    assert len(tokens(result)) == 3
    scheduler.send_plan(maker.plan(decode=[0, 2]))
    assert scheduler.result(2).row_status == b""


def test_plan_that_only_releases_is_answered(scheduler: SchedulerStub) -> None:
    maker = PlanMaker()
    run_one_request(scheduler, maker)
    scheduler.send_plan(maker.plan(release=[0]))
    assert tokens(scheduler.result(3)) == []
    run_one_request(scheduler, maker)


def test_prefill_chunk_without_a_sample(scheduler: SchedulerStub) -> None:
    maker = PlanMaker()
    scheduler.send_plan(maker.plan(admit={0: ([3, 4], GREEDY)}, prefill={0: [1, 2, 3]}, sample=False))
    scheduler.send_plan(maker.plan(prefill={0: [4, 5]}))
    assert tokens(scheduler.result(1)) == []
    assert tokens(scheduler.result(2)) == [next_token(5, 5)]


def test_bad_plan_faults_and_a_new_epoch_works(scheduler: SchedulerStub) -> None:
    maker = PlanMaker()
    run_one_request(scheduler, maker)
    bad = maker.plan(extend=[(0, 4)], decode=[0])
    bad.slot_mapping = int32s([0])
    scheduler.send_plan(bad)
    scheduler.send_plan(maker.plan(decode=[0]))
    assert assert_fault(scheduler, pb.FAULT_CODE_MISMATCH, "slot mapping").step_id == 3
    scheduler.welcome()
    run_one_request(scheduler, PlanMaker())


def test_malformed_plan_faults(scheduler: SchedulerStub) -> None:
    scheduler.send_plan(pb.StepPlan(step_id=1, rows=b"abc"))
    assert_fault(scheduler, pb.FAULT_CODE_BAD_PLAN, "whole number")


@pytest.mark.parametrize(
    ("token", "code", "message"),
    [
        (RAISES, pb.FAULT_CODE_DEVICE_ERROR, "RuntimeError: the device fell over"),
        (EXHAUSTS_MEMORY, pb.FAULT_CODE_OUT_OF_MEMORY, "no memory left"),
    ],
)
def test_step_that_raises(scheduler: SchedulerStub, token: int, code: int, message: str) -> None:
    scheduler.send_plan(PlanMaker().plan(admit={0: ([3], GREEDY)}, prefill={0: [token]}))
    assert "\n" not in assert_fault(scheduler, code, message).message
    scheduler.welcome()
    run_one_request(scheduler, PlanMaker())


def test_lost_and_repeated_plans(scheduler: SchedulerStub) -> None:
    maker = PlanMaker()
    plans = [maker.plan(admit={0: ([3, 4], GREEDY)}, prefill={0: [1]})] + [maker.plan(decode=[0]) for _ in range(3)]
    for index in (0, 2, 3):  # plan 2 is lost
        scheduler.send_plan(plans[index])
    scheduler.result(1)
    behind = scheduler.receive("heartbeat")
    assert (behind.heartbeat.last_step, behind.acked) == (1, 1)
    for index in (0, 1, 2, 3):
        scheduler.send_plan(plans[index])
    for step_id in (2, 3, 4):
        scheduler.result(step_id)


def test_result_is_sent_again_until_acknowledged(scheduler: SchedulerStub) -> None:
    scheduler.send_plan(PlanMaker().plan(admit={0: ([3], GREEDY)}, prefill={0: [1]}))
    scheduler.result(1)
    scheduler.settled_step = 0  # as if the result had not come
    scheduler.result(1)


def test_frames_of_another_epoch_are_ignored(scheduler: SchedulerStub) -> None:
    scheduler.epoch -= 1
    scheduler.send_plan(PlanMaker().plan(admit={0: ([3], GREEDY)}, prefill={0: [1]}))
    scheduler.epoch += 1
    run_one_request(scheduler, PlanMaker())


def test_scheduler_restart(lone_scheduler: SchedulerStub, executor: subprocess.Popen[str]) -> None:
    lone_scheduler.welcome()
    run_one_request(lone_scheduler, PlanMaker())
    lone_scheduler.close()
    successor = SchedulerStub(lone_scheduler.endpoint, "successor")
    try:
        successor.welcome(timeout=10)
        run_one_request(successor, PlanMaker())
    finally:
        successor.close()


def test_executor_starts_before_its_scheduler() -> None:
    absent = SchedulerStub()
    absent.close()
    command = [sys.executable, "-m", "tests.executor_process.stub_executor", absent.endpoint]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        time.sleep(2.5)
        scheduler = SchedulerStub(absent.endpoint)
        try:
            scheduler.welcome()
            run_one_request(scheduler, PlanMaker())
        finally:
            process.kill()
            scheduler.close()


def test_refusal_ends_the_process(lone_scheduler: SchedulerStub, executor: subprocess.Popen[str]) -> None:
    hello = lone_scheduler.receive("hello").hello
    lone_scheduler.send(welcome=pb.Welcome(nonce=hello.nonce, accepted=False, reject_reason="other weights"))
    _, stderr = executor.communicate(timeout=5)
    assert executor.returncode == 3
    assert stderr.splitlines()[-1] == "error: the scheduler refuses this executor: other weights"


def test_sigterm_during_a_long_step(lone_scheduler: SchedulerStub, executor: subprocess.Popen[str]) -> None:
    lone_scheduler.welcome()
    lone_scheduler.send_plan(PlanMaker().plan(admit={0: ([3], GREEDY)}, prefill={0: [SLEEPS]}))
    time.sleep(0.2)
    executor.terminate()
    assert lone_scheduler.receive("drain").drain.redirect == ""
    lone_scheduler.result(1)  # what it has is finished
    lone_scheduler.send(drain=pb.Drain())
    executor.communicate(timeout=5)
    assert executor.returncode == 0


def test_a_second_sigterm_does_not_wait_for_the_scheduler(
    lone_scheduler: SchedulerStub, executor: subprocess.Popen[str]
) -> None:
    lone_scheduler.welcome()
    lone_scheduler.send_plan(PlanMaker().plan(admit={0: ([3], GREEDY)}, prefill={0: [SLEEPS]}))
    executor.terminate()
    lone_scheduler.receive("drain")
    executor.terminate()
    executor.communicate(timeout=5)
    assert executor.returncode == 0


def test_sigterm_without_a_scheduler(lone_scheduler: SchedulerStub, executor: subprocess.Popen[str]) -> None:
    lone_scheduler.welcome()
    executor.terminate()
    lone_scheduler.receive("drain")
    lone_scheduler.close()
    executor.communicate(timeout=5)
    assert executor.returncode == 0


def test_an_executor_that_is_let_go_joins_the_scheduler_it_is_sent_to() -> None:
    # long leases: a busy machine must not end a session before its Drain does
    first = SchedulerStub(scheduler_id="first", lease_ms=10_000)
    second = SchedulerStub(scheduler_id="second", lease_ms=10_000)
    process = start(f"{first.endpoint},{second.endpoint}")
    try:
        first.welcome()  # the only one that answers: the other waits for nothing yet
        run_one_request(first, PlanMaker())
        first.send(drain=pb.Drain(redirect=second.endpoint))
        second.welcome()
        run_one_request(second, PlanMaker())
    finally:
        process.kill()
        process.communicate()
        first.close()
        second.close()
