"""``baton top``: what two looks tell together, and the frame that shows it."""

import io
from dataclasses import replace

from rich.console import Console

from baton.cli.top_view import draw
from baton.top import History, Rates
from baton.values import ClusterStatus, ExecutorStatus, ModelInfo
from tests.client.fake_server import FakeServer
from tests.client.test_cli import BATON, run
from tests.e2e.terminal import CTRL_C, Terminal

ONE = ExecutorStatus(
    executor_id="a",
    epoch=1,
    device="cpu",
    running_requests=4,
    waiting_requests=0,
    max_rows=8,
    total_blocks=100,
    free_blocks=50,
    cached_blocks=20,
    used_blocks=30,
    block_size=16,
    run_ahead=2,
    inflight_steps=1,
    steps=1000,
    preemptions=0,
    prefix_hit_tokens=100,
    prefix_query_tokens=400,
    starved_us=1_000_000,
    device_us=5_000_000,
    computed_tokens=9000,
    sampled_tokens=4000,
    stale_tokens=0,
    audited_tokens=0,
    audit_mismatches=0,
    handovers=0,
)


def status(*executors: ExecutorStatus, scheduler_id: str = "s") -> ClusterStatus:
    return ClusterStatus(scheduler_id, 0, executors)


def test_rates_are_differences_over_time() -> None:
    history = History()
    first = history.look(status(ONE), 10.0)
    assert (first.rates, first.tokens_per_s, first.sessions_ended) == ({}, None, 0)
    later = replace(
        ONE,
        running_requests=6,
        steps=1100,
        starved_us=1_100_000,
        device_us=5_300_000,
        prefix_hit_tokens=150,
        prefix_query_tokens=500,
        computed_tokens=9700,
        sampled_tokens=4500,
    )
    second = history.look(status(later), 12.0)
    expected = Rates(
        steps_per_s=50.0, step_ms=3.0, starved=0.25, tokens_per_s=250.0, prefill_per_s=100.0, prefix_hits=0.5
    )
    assert second.rates == {"a": expected}
    assert second.tokens_per_s == 250.0


def test_nothing_is_made_up_of_an_idle_executor() -> None:
    history = History()
    history.look(status(ONE), 1.0)
    assert history.look(status(ONE), 2.0).rates["a"] == Rates(0.0, None, None, 0.0, 0.0, None)


def test_a_new_session_has_no_rates_yet() -> None:
    history = History()
    history.look(status(ONE), 1.0)
    look = history.look(status(replace(ONE, epoch=2, steps=5)), 2.0)
    assert (look.rates, look.sessions_ended) == ({}, 1)


def test_executors_that_left_are_remembered_until_they_return() -> None:
    history = History()
    other = replace(ONE, executor_id="b", epoch=3)
    history.look(status(ONE, other), 1.0)
    look = history.look(status(ONE), 2.0)
    assert (look.gone, look.sessions_ended) == ({"b": other}, 3)
    assert history.look(status(ONE), 3.0).gone == {"b": other}
    look = history.look(status(ONE, replace(other, epoch=4)), 4.0)
    assert (look.gone, look.sessions_ended) == ({}, 3)


def test_another_scheduler_is_another_history() -> None:
    history = History()
    history.look(status(ONE, replace(ONE, executor_id="b")), 1.0)
    look = history.look(status(ONE, scheduler_id="t"), 2.0)
    assert (look.gone, look.rates) == ({}, {})


def test_one_frame_for_a_pipe(server: FakeServer) -> None:
    done = run("top", "--server", server.address, "--interval", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    headline, summary, _, header, row = done.stdout.splitlines()
    assert headline.endswith("executors: 1; queued requests: 4 for up to 2.5 s")
    assert summary.startswith("running: 0; waiting: 0; tokens/s: 0; ")
    assert header.split()[0] == "executor"
    assert row.split()[:4] == ["executor-0", "█" * 3 + "·" * 9, "25%", "0%"]


def test_a_narrow_terminal_gets_fewer_columns_and_whole_cells() -> None:
    look = History().look(status(ONE), 1.0)
    for width, columns in ((150, 13), (120, 11), (80, 7)):
        console = Console(width=width, file=io.StringIO())
        console.print(draw(console, ModelInfo("m", "", (), "", 1, 1, (), False), look))
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        header = next(line for line in lines if line.startswith("executor "))
        assert len(header.replace("KV used, cached", "KV").replace("step ms", "ms").split()) == columns
        assert "…" not in header


def test_nobody_to_watch() -> None:
    done = run("top", "--server", "127.0.0.1:1")
    assert done.returncode == 1 and done.stderr.startswith("error: cannot connect to 127.0.0.1:1")


def test_on_a_terminal_q_leaves(server: FakeServer) -> None:
    with Terminal([BATON, "top", "--server", server.address, "--interval", "0.1"]) as terminal:
        terminal.wait_for("executor-0")
        terminal.wait_for("executor-0")
        terminal.press("xq")
        assert terminal.finish() == 0


def test_on_a_terminal_ctrl_c_leaves(server: FakeServer) -> None:
    with Terminal([BATON, "top", "--server", server.address]) as terminal:
        terminal.wait_for("executor-0")
        terminal.press(CTRL_C)
        assert terminal.finish() == 130
