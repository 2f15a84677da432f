"""``baton status``."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.cli.options import DEFAULT_SERVER, TIMEOUT_SECONDS, ServerOption, examples
from baton.cli.outcome import exit_codes
from baton.client import Client
from baton.values import ClusterStatus, ExecutorStatus, ModelInfo

_PIPED_WIDTH = 200  # nobody looks at a pipe's width: never cut a cell


_WATCH_SECONDS = 1.0
_COLUMNS = (
    "device",
    "running",
    "waiting",
    "KV used",
    "cached",
    "free",
    "run-ahead",
    "steps",
    "preempted",
    "handed over",
    "stale",
    "mismatches",
    "prefix hits",
    "starved",
)
EXAMPLES = examples("baton status", "baton status --watch", "baton status --json | jq .cluster.executors")


def status(
    server: ServerOption = DEFAULT_SERVER,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Print it again every second until Ctrl-C.")] = False,
) -> None:
    """Show the served model and every executor.

    With --watch it is a log, for files and pipes; to look at, there is `baton top`.
    Stale tokens were sampled for requests that had ended meanwhile; mismatches are
    tokens that did not come again when a stream went on elsewhere, of those looked at.
    """
    with exit_codes(), Client(server) as client:
        console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
        _show(client, console, as_json)
        while watch:
            sys.stdout.flush()
            time.sleep(_WATCH_SECONDS)
            _show(client, console, as_json)


def _show(client: Client, console: Console, as_json: bool) -> None:
    state = client.cluster_status(timeout=TIMEOUT_SECONDS)
    model = client.model_info(timeout=TIMEOUT_SECONDS)
    if as_json:
        print(json.dumps({"model": asdict(model), "cluster": asdict(state)}, ensure_ascii=False))
        return
    console.print(headline(model, state), markup=False)
    table = _table(state.executors)
    if console.measure(table, options=console.options.update(width=_PIPED_WIDTH)).maximum <= console.width:
        console.print(table)
        return
    for one in by_name(state.executors):  # as text, because rich would cut the cells of a table that is too wide
        cells = zip(_COLUMNS, _cells(one), strict=True)
        text = f"{one.executor_id}: {', '.join(f'{name} {cell}' for name, cell in cells)}"
        console.print(text, markup=False, soft_wrap=False)


def headline(model: ModelInfo, state: ClusterStatus) -> str:
    """What is served, by how many executors, how many requests wait for one, and how long one of them has waited."""
    dtype = f" ({model.dtype})" if model.dtype else ""
    waited = f" for up to {state.oldest_queued_us / 1e6:.1f} s" if state.queued_requests else ""
    return (
        f"model {model.model}{dtype}, at most {model.max_total_tokens} tokens per request; "
        f"executors: {len(state.executors)}; queued requests: {state.queued_requests}{waited}"
    )


def _table(executors: tuple[ExecutorStatus, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("executor", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "device" else "right", no_wrap=True)
    for one in by_name(executors):
        table.add_row(one.executor_id, *_cells(one))
    return table


def by_name(executors: tuple[ExecutorStatus, ...]) -> list[ExecutorStatus]:
    """Executors in an order that stays."""
    return sorted(executors, key=lambda executor: executor.executor_id)


def _cells(one: ExecutorStatus) -> tuple[str, ...]:
    """What ``_COLUMNS`` names."""
    return (
        one.device,
        f"{one.running_requests}/{one.max_rows}",
        str(one.waiting_requests),
        share(one.used_blocks, one.total_blocks),
        share(one.cached_blocks, one.total_blocks),
        share(one.free_blocks, one.total_blocks),
        str(one.run_ahead),
        str(one.steps),
        str(one.preemptions),
        str(one.handovers),
        str(one.stale_tokens),
        f"{one.audit_mismatches}/{one.audited_tokens}",
        share(one.prefix_hit_tokens, one.prefix_query_tokens),
        share(one.starved_us, one.starved_us + one.device_us),
    )


def share(part: float, whole: float) -> str:
    """Of a whole, in percent; a dash of nothing."""
    return f"{100 * part / whole:.0f}%" if whole else "-"
