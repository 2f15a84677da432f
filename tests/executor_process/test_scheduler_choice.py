"""Which scheduler an executor joins, as numbers go by."""

from baton_protos import execution_pb2 as pb
from executor_service.endpoints import is_name, parse, resolve
from executor_service.scheduler_choice import SchedulerChoice
from executor_service.wire import Census

A, B, C = "tcp://a:1", "tcp://b:1", "tcp://c:1"


def asked(choice: SchedulerChoice) -> dict[str, int]:
    """The endpoints that were asked, with the nonces."""
    found = {endpoint: pb.Envelope.FromString(frame).probe.nonce for endpoint, frame in choice.outgoing}
    choice.outgoing.clear()
    return found


def answer(choice: SchedulerChoice, now: float, **executors: int) -> None:
    """Some of the schedulers answer the last question."""
    choice.seek(now)
    nonces = asked(choice)
    for name, count in executors.items():
        endpoint = f"tcp://{name}:1"
        choice.receive(endpoint, Census(nonces[endpoint], count, 0), now)
    choice.seek(now)


def test_a_single_scheduler_is_home_and_never_asked() -> None:
    choice = SchedulerChoice([A], 1)
    choice.seek(0.0)
    assert choice.home == A and not choice.outgoing
    assert choice.look_around(5.0) is None and not choice.outgoing
    choice.leave(6.0, B)
    assert choice.home == A


def test_the_neediest_is_chosen_once_all_have_answered() -> None:
    choice = SchedulerChoice([A, B, C], 1)
    answer(choice, 0.0, a=2, b=1, c=3)
    assert choice.home == B


def test_of_equals_the_one_with_the_longer_queue_is_chosen() -> None:
    choice = SchedulerChoice([A, B], 1)
    choice.seek(0.0)
    nonces = asked(choice)
    choice.receive(A, Census(nonces[A], 0, 3), 0.0)
    choice.receive(B, Census(nonces[B], 0, 4), 0.0)
    choice.seek(0.0)
    assert choice.home == B


def test_the_silent_are_not_waited_for_long() -> None:
    choice = SchedulerChoice([A, B], 1)
    answer(choice, 0.0, a=7)
    assert choice.home is None
    choice.seek(choice.deadline)
    assert choice.home == A


def test_nobody_answers_so_all_are_asked_again() -> None:
    choice = SchedulerChoice([A, B], 1)
    choice.seek(0.0)
    first = asked(choice)
    choice.seek(choice.deadline)
    assert asked(choice) == first
    choice.receive(A, Census(first[A], 0, 0), 0.3)
    choice.receive(B, Census(first[A], 1, 0), 0.35)
    choice.seek(0.35)
    assert choice.home == A


def test_answers_to_an_earlier_search_do_not_count() -> None:
    choice = SchedulerChoice([A, B], 1)
    choice.seek(0.0)
    early = asked(choice)
    choice.leave(1.0)
    choice.seek(1.0)
    for endpoint, nonce in early.items():
        choice.receive(endpoint, Census(nonce, 0, 0), 1.0)
    choice.seek(1.0)
    assert choice.home is None


def test_a_scheduler_that_does_not_welcome_is_given_up() -> None:
    choice = SchedulerChoice([A, B], 1)
    answer(choice, 0.0, a=0, b=1)
    assert choice.home == A
    choice.seek(choice.deadline)
    assert choice.home is None
    assert asked(choice).keys() == {A, B}


def test_after_a_loss_the_search_begins_anew_and_a_redirect_is_followed() -> None:
    choice = SchedulerChoice([A, B], 1)
    answer(choice, 0.0, a=0, b=1)
    choice.leave(10.0)
    assert choice.home is None
    answer(choice, 10.0, b=5)
    choice.seek(10.2)
    assert choice.home == B
    choice.leave(20.0, A)
    assert choice.home == A
    choice.leave(30.0, "tcp://stranger:1")
    assert choice.home is None


def looked(choice: SchedulerChoice, now: float, a: int, b: int) -> str | None:
    assert choice.look_around(now) is None
    for endpoint, nonce in asked(choice).items():
        choice.receive(endpoint, Census(nonce, {A: a, B: b}[endpoint], 0), now)
    return choice.look_around(now)


def test_a_starved_peer_is_seen_when_ours_can_spare_one() -> None:
    choice = SchedulerChoice([A, B], 1)
    answer(choice, 0.0, a=0, b=1)
    assert choice.home == A
    assert looked(choice, 10.0, a=2, b=0) == B
    assert looked(choice, 20.0, a=1, b=0) is None
    assert looked(choice, 30.0, a=5, b=1) is None


def test_endpoints_are_parsed_and_names_resolved() -> None:
    assert parse(" tcp://a:1, tcp://b:2,tcp://a:1,") == ("tcp://a:1", "tcp://b:2")
    names = {"tcp://a:1": True, "tcp://127.0.0.1:1": False, "tcp://[::1]:1": False, "tcp://localhost:1": False}
    assert {name: is_name(name) for name in names} == names
    assert not is_name("ipc:///tmp/x") and not is_name("nonsense")
    assert resolve(["tcp://127.0.0.1:1", "ipc:///x"]) == ("tcp://127.0.0.1:1", "ipc:///x")
    assert resolve(["tcp://no-such-name.invalid:1"]) == ("tcp://no-such-name.invalid:1",)
