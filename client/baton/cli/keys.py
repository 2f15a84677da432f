"""``baton keys``."""

from pathlib import Path
from typing import Annotated

import typer

from baton.cli.options import examples
from baton.cli.outcome import exit_codes
from baton.keys import KeyDirectory

EXAMPLES = examples(
    "baton keys secrets --executor gpu-a --executor gpu-b",
    "baton keys secrets --host scheduler.example.com --client ops --tenant acme",
    "baton keys secrets --tenant acme --force",
)


def keys(
    directory: Annotated[Path, typer.Argument(help="Where the files go.", metavar="DIR")],
    executor: Annotated[
        list[str] | None, typer.Option(help="An executor, or all those that share a secret.", metavar="NAME")
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address by which callers reach the gRPC port.", metavar="HOST")
    ] = None,
    client: Annotated[list[str] | None, typer.Option(help="A caller with a certificate.", metavar="NAME")] = None,
    tenant: Annotated[list[str] | None, typer.Option(help="A tenant with a token.", metavar="NAME")] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Validity of certificates.")] = 365,
    force: Annotated[bool, typer.Option("--force", help="Replace what is named here.")] = False,
) -> None:
    """Make keys, certificates and tokens for a cluster on several machines.

    The first call makes the scheduler's key and, for the first --host or
    --client, a certificate authority; both are kept from then on. To revoke an
    executor, delete its file in DIR/executors; a tenant, its line in DIR/tokens.
    """
    executors, hosts, clients, tenants = executor or [], host or [], client or [], tenant or []
    with exit_codes():
        made = KeyDirectory(directory, force=force)
        if not (executors or hosts or clients or tenants):
            executors = ["executor"]
        for name in executors:
            made.executor(name)
        if hosts:
            made.server(hosts, days)
        for name in clients:
            made.client(name, days)
        for name in tenants:
            made.tenant(name)
        print(_instructions(directory, executors, hosts, clients, tenants))


def _instructions(
    directory: Path, executors: list[str], hosts: list[str], clients: list[str], tenants: list[str]
) -> str:
    """What to put where."""
    where = directory.resolve()
    scheduler, lines = [], []
    if executors:
        scheduler.append(f"--curve-key {where}/scheduler.key --executor-keys {where}/executors")
    if hosts:
        scheduler.append(f"--tls-cert {where}/server.crt --tls-key {where}/server.key")
    if clients:
        scheduler.append(f"--tls-client-ca {where}/ca.crt")
    if tenants:
        scheduler.append(f"--tokens {where}/tokens")
    if scheduler:
        lines += ["scheduler:", *(f"  {flags}" for flags in scheduler)]
    for name in executors:
        lines += [
            f"executor {name}:",
            f"  --curve-key {where}/executor-{name}.key --scheduler-key {where}/scheduler.pub",
        ]
    if hosts or clients or tenants:
        lines += ["callers:"]
    if hosts or clients:
        lines += [f"  BATON_TLS_CA={where}/ca.crt"]
    lines += [f"  BATON_TLS_CERT={where}/client-{name}.crt BATON_TLS_KEY={where}/client-{name}.key" for name in clients]
    lines += [f"  BATON_TOKEN_FILE={where}/token-{name}" for name in tenants]
    if hosts or clients:
        lines += [f"Keep {where}/ca.key away from all of them: it signs certificates."]
    return "\n".join(lines)
