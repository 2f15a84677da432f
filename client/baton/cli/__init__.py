"""The ``baton`` command."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from baton.cli import bench, chat, cluster, executors, generate, keys, models, status, top
from baton.cli.options import export_credentials

_PANEL = "Protected schedulers (or BATON_TLS_CA=FILE and so on, BATON_TOKEN=TOKEN)"

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
app.command(epilog=top.EXAMPLES)(top.top)
app.command(epilog=cluster.EXAMPLES)(cluster.cluster)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.command(epilog=keys.EXAMPLES)(keys.keys)
app.add_typer(executors.app, name="executors")
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
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt; implied by the next three.", rich_help_panel=_PANEL)
    ] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Whose certificates to trust, PEM.", metavar="FILE", rich_help_panel=_PANEL)
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Your certificate, PEM.", metavar="FILE", rich_help_panel=_PANEL)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its private key, PEM.", metavar="FILE", rich_help_panel=_PANEL)
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with your token.", metavar="FILE", rich_help_panel=_PANEL)
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Send the token even unencrypted.", rich_help_panel=_PANEL)
    ] = False,
) -> None:
    export_credentials(tls_ca, tls_cert, tls_key, token_file, tls=tls, insecure=insecure)


def main() -> None:
    """Entry point. Exit codes: 0 ok, 1 the request or the cluster failed, 2 usage, 130 Ctrl-C."""
    app()
