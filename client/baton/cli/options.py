"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from baton import credentials

DEFAULT_SERVER = "127.0.0.1:50051"
TIMEOUT_SECONDS = 10.0  # for questions that a cluster answers at once

ServerOption = Annotated[str, typer.Option(help="The scheduler's gRPC address.", metavar="HOST:PORT")]


def export_credentials(
    ca: Path | None, cert: Path | None, key: Path | None, token_file: Path | None, *, tls: bool, insecure: bool
) -> None:
    """Flags override the environment, which clients take their credentials from: this process's, and its children's."""
    given: dict[str, object] = {
        credentials.CA_VARIABLE: ca,
        credentials.CERT_VARIABLE: cert,
        credentials.KEY_VARIABLE: key,
        credentials.TOKEN_FILE_VARIABLE: token_file,
        credentials.TLS_VARIABLE: 1 if tls else None,
        credentials.INSECURE_VARIABLE: 1 if insecure else None,
    }
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    if token_file is not None:
        os.environ.pop(credentials.TOKEN_VARIABLE, None)


def examples(*commands: str) -> str:
    """An epilog for ``--help``: one command to a line."""
    return "\n\n".join(("Examples:", *(f"  {command}" for command in commands)))
