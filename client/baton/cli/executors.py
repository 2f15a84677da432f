"""``baton executors``: pause, resume and drain them."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.cli.options import DEFAULT_SERVER, TIMEOUT_SECONDS, ServerOption, examples
from baton.cli.outcome import exit_codes
from baton.client import Client

_PIPED_WIDTH = 200  # nobody looks at a pipe's width: never cut a cell
EXAMPLES = examples("baton executors", "baton executors drain executor-0")

app = typer.Typer(help="List executors, or take them out of service.", epilog=EXAMPLES)

ExecutorArgument = Annotated[str, typer.Argument(help="Its name, as listed.", metavar="EXECUTOR")]


@app.callback(invoke_without_command=True)
def executors(context: typer.Context, server: ServerOption = DEFAULT_SERVER) -> None:
    """List the executors and what they are there for."""
    if context.invoked_subcommand is not None:
        return
    with exit_codes(), Client(server) as client:
        table = Table(box=None, pad_edge=False)
        for column in ("executor", "state", "device", "running", "waiting"):
            table.add_column(column, justify="right" if column in {"running", "waiting"} else "left", no_wrap=True)
        status = client.cluster_status(timeout=TIMEOUT_SECONDS)
        for one in sorted(status.executors, key=lambda one: one.executor_id):
            running = f"{one.running_requests}/{one.max_rows}"
            table.add_row(one.executor_id, one.state, one.device, running, str(one.waiting_requests))
        Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH).print(table)


@app.command()
def pause(executor: ExecutorArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """Give an executor no new requests; those that run there go on."""
    with exit_codes(), Client(server) as client:
        client.pause_executor(executor, timeout=TIMEOUT_SECONDS)


@app.command()
def resume(executor: ExecutorArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """End a pause."""
    with exit_codes(), Client(server) as client:
        client.resume_executor(executor, timeout=TIMEOUT_SECONDS)


@app.command()
def drain(executor: ExecutorArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """Hand an executor's requests over to others, then end its process."""
    with exit_codes(), Client(server) as client:
        client.drain_executor(executor, timeout=TIMEOUT_SECONDS)
