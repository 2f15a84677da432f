"""The ``baton`` command."""

from importlib.metadata import version
from typing import Annotated

import typer

from baton.cli.cluster import cluster
from baton.cli.generate import generate
from baton.cli.status import status

app = typer.Typer(
    help="Baton serves large language models: a CPU-only scheduler that owns every request, and executors.",
    epilog="Start with: baton cluster, and in another terminal: baton generate 'def fibonacci(n):'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(status)
app.command()(cluster)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"baton {version('baton')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. Exit codes: 0 ok, 1 the request or the cluster failed, 2 usage, 130 Ctrl-C."""
    app()
