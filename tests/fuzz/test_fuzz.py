"""A short slice of ``make fuzz``."""

import pytest

from baton_protos import engine_pb2
from scheduler_service.engine import api_wire
from tests.fuzz.in_process import TARGETS, run
from tests.fuzz.sockets import SocketTarget

SEED = 20_260
MESSAGES = {"engine": 3_000, "engine with a traitor": 2_000, "executor": 2_000, "api": 8_000, "dialects": 8_000}
SOCKET_MESSAGES = 200


@pytest.mark.parametrize("name", TARGETS)
def test_in_process(name: str) -> None:
    sent, served = run(name, SEED, MESSAGES[name], lambda done: None)
    assert sent >= MESSAGES[name]
    assert served > 0


@pytest.mark.parametrize("protected", [False, True], ids=["without keys", "with keys"])
def test_through_sockets(protected: bool) -> None:
    target = SocketTarget(SEED, protected=protected)
    try:
        target.run(SOCKET_MESSAGES, lambda done: None)
    finally:
        target.close()
    assert target.served > 0


def test_a_minimum_of_tokens_above_the_maximum_does_not_reach_the_core() -> None:
    """Found by the above: it overflowed the row table's column."""
    submit = engine_pb2.Submit(handle=1, max_tokens=4)
    submit.sampling.min_tokens = 2**32 - 1
    with pytest.raises(api_wire.WireError, match="min_tokens"):
        api_wire.decode(engine_pb2.ToEngine(submit=submit).SerializeToString())
