"""How many requests of a tenant wait for callers who lost their connection."""

from pathlib import Path
from typing import Any

from baton_protos import generation_pb2 as pb
from scheduler_service.api.holds import HoldEnd, Holds
from scheduler_service.api.request_key import RequestKey

from .conftest import Serve, until
from .fake_engine import FakeEngine
from .reading import ask, read, resumed


def keeping(name: str, **fields: Any) -> pb.GenerateRequest:
    return ask(**{"request_id": name, "resume_window_ms": 60_000, "max_tokens": 900, **fields})


async def break_off(stub: Any, name: str, **metadata: str) -> Any:
    call = stub.GenerateStream(keeping(name), metadata=tuple(metadata.items()))
    begun = await read(call, limit=3)
    call.cancel()
    return begun


async def test_the_one_that_has_waited_longest_gives_way(engine: FakeEngine, serve: Serve) -> None:
    served = await serve(max_held_requests=2)
    names = ("a", "b", "c")
    begun = {}
    for name in names:
        begun[name] = await break_off(served.stub, name)
        held = served.server._intake._requests._holds
        await until(lambda name=name, held=held: RequestKey("", name) in held)  # type: ignore[misc]
    assert [key.request_id for key in held.waiting()] == ["b", "c"]
    await until(lambda: engine.aborted == [engine.handle_of(0)])
    # Its caller goes on all the same: as a new request, from what it has.
    points = tuple(begun["a"].points())
    engine.submits.clear()
    call = served.stub.GenerateStream(resumed(keeping("a"), begun["a"].start, *points))
    assert (await read(call, points, limit=3)).start.seed == begun["a"].start.seed
    assert len(engine.submits) == 1
    # Who waits is taken over as ever.
    await read(served.stub.GenerateStream(keeping("c")), limit=3)
    assert len(engine.submits) == 1
    metrics = served.server._metrics.holds
    ends = {how: metrics[how]._value.get() for how in HoldEnd}
    assert (ends[HoldEnd.DISPLACED], ends[HoldEnd.RESUMED], ends[HoldEnd.EXPIRED]) == (1, 1, 0)


async def test_tenants_do_not_displace_each_other(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("".join(f"{tenant}:{tenant * 16}\n" for tenant in ("a", "b")))
    served = await serve(max_held_requests=1, tokens=tokens)
    held = served.server._intake._requests._holds
    for tenant in ("a", "b"):
        await break_off(served.stub, "same name", authorization=f"Bearer {tenant * 16}")
        await until(lambda tenant=tenant: RequestKey(tenant, "same name") in held)  # type: ignore[misc]
    assert len(held) == 2 and not engine.aborted


async def test_a_wait_ends_once() -> None:
    ends: list[HoldEnd] = []
    dropped: list[str] = []
    holds = Holds(1, ends.append)
    first, second = RequestKey("t", "first"), RequestKey("t", "second")
    holds.begin(first, 60.0, lambda: dropped.append("first"))
    holds.begin(second, 0.001, lambda: dropped.append("second"))
    await until(lambda: not len(holds))
    holds.end(first, HoldEnd.DROPPED)
    holds.end(second, HoldEnd.RESUMED)
    assert dropped == ["first", "second"]
    assert ends == [HoldEnd.DISPLACED, HoldEnd.EXPIRED]
    assert second not in holds and not holds._tenants


async def test_aborted_by_name_it_waits_no_longer(engine: FakeEngine, serve: Serve) -> None:
    served = await serve(max_held_requests=1)
    await break_off(served.stub, "a")
    held = served.server._intake._requests._holds
    await until(lambda: len(held))
    await served.stub.Abort(pb.AbortRequest(request_ids=["a"]))
    assert not len(held)
