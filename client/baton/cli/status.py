"""``baton status``."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.cli.generate import DEFAULT_SERVER, ServerOption
from baton.cli.outcome import exit_codes
from baton.client import Client
from baton.values import ClusterStatus, ExecutorStatus, ModelInfo

_TIMEOUT_SECONDS = 10.0
_PIPED_WIDTH = 200  # nobody looks at a pipe's width: never cut a cell


def status(
    server: ServerOption = DEFAULT_SERVER,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the served model and every executor."""
    with exit_codes(), Client(server) as client:
        state = client.cluster_status(timeout=_TIMEOUT_SECONDS)
        model = client.model_info(timeout=_TIMEOUT_SECONDS)
        if as_json:
            print(json.dumps({"model": asdict(model), "cluster": asdict(state)}, ensure_ascii=False))
            return
        console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
        console.print(_headline(model, state), markup=False)
        console.print(_table(state.executors))


def _headline(model: ModelInfo, state: ClusterStatus) -> str:
    dtype = f" ({model.dtype})" if model.dtype else ""
    return (
        f"model {model.model}{dtype}, at most {model.max_total_tokens} tokens per request; "
        f"executors: {len(state.executors)}; queued requests: {state.queued_requests}"
    )


def _table(executors: tuple[ExecutorStatus, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("executor", "device"):
        table.add_column(column, no_wrap=True)
    for column in (
        "running",
        "waiting",
        "KV used",
        "cached",
        "free",
        "run-ahead",
        "steps",
        "preempted",
        "prefix hits",
        "starved",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for one in sorted(executors, key=lambda executor: executor.executor_id):
        table.add_row(
            one.executor_id,
            one.device,
            f"{one.running_requests}/{one.max_rows}",
            str(one.waiting_requests),
            _share(one.used_blocks, one.total_blocks),
            _share(one.cached_blocks, one.total_blocks),
            _share(one.free_blocks, one.total_blocks),
            str(one.run_ahead),
            str(one.steps),
            str(one.preemptions),
            _share(one.prefix_hit_tokens, one.prefix_query_tokens),
            _share(one.starved_us, one.starved_us + one.device_us),
        )
    return table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
