"""The ``baton`` command."""

from importlib.metadata import version
from typing import Annotated

import typer

from baton.cli import chat, cluster, generate, models, status

app = typer.Typer(
    help="Baton serves large language models: a CPU-only scheduler that owns every request, and executors.",
    epilog="Start with: baton cluster, and in another terminal: baton generate 'def fibonacci(n):'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=chat.EXAMPLES)(chat.chat)
app.command(epilog=status.EXAMPLES)(status.status)
app.command(epilog=cluster.EXAMPLES)(cluster.cluster)
app.add_typer(models.app, name="models")


@app.command("version")
def _version() -> None:
    """Print the version."""
    typer.echo(f"baton {version('baton')}")


def _print_version(wanted: bool) -> None:
    if wanted:
        _version()
        raise typer.Exit


@app.callback()
def _options(
    _wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. Exit codes: 0 ok, 1 the request or the cluster failed, 2 usage, 130 Ctrl-C."""
    app()
