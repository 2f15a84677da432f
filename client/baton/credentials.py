"""How a client proves who it is, and checks whom it talks to."""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from baton.errors import CredentialsError

TLS_VARIABLE = "BATON_TLS"
CA_VARIABLE = "BATON_TLS_CA"
CERT_VARIABLE = "BATON_TLS_CERT"
KEY_VARIABLE = "BATON_TLS_KEY"
TOKEN_VARIABLE = "BATON_TOKEN"
TOKEN_FILE_VARIABLE = "BATON_TOKEN_FILE"
INSECURE_VARIABLE = "BATON_INSECURE"

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a scheduler asks for; nothing by default: plaintext, and no token.

    Attributes:
        tls: encrypt, and trust the CAs that gRPC comes with; implied by the files below.
        ca: CA certificates to trust instead, PEM.
        cert: this caller's certificate chain, PEM, for schedulers that ask for one.
        key: its private key, PEM.
        token: the tenant's bearer token.
        insecure: send the token to another machine even in plaintext.
    """

    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token: str = field(default="", repr=False)
    insecure: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """What ``BATON_TLS`` (1), ``BATON_TLS_CA``, ``BATON_TLS_CERT``, ``BATON_TLS_KEY``, ``BATON_TOKEN`` or
        ``BATON_TOKEN_FILE``, and ``BATON_INSECURE`` (1) say.

        Raises:
            CredentialsError: the token's file cannot be read.
        """
        token = environment.get(TOKEN_VARIABLE, "")
        if not token and (file := environment.get(TOKEN_FILE_VARIABLE)):
            token = _read(Path(file)).decode(errors="replace").strip()
        return cls(
            tls=environment.get(TLS_VARIABLE, "") not in {"", "0"},
            ca=_path(environment, CA_VARIABLE),
            cert=_path(environment, CERT_VARIABLE),
            key=_path(environment, KEY_VARIABLE),
            token=token,
            insecure=environment.get(INSECURE_VARIABLE, "") not in {"", "0"},
        )

    @property
    def encrypts(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls or self.ca is not None or self.cert is not None or self.key is not None

    def metadata(self, target: str) -> Metadata:
        """What goes with every call to ``target`` (``host:port``).

        Raises:
            CredentialsError: the token is malformed, or would travel to another machine in plaintext.
        """
        if not self.token:
            return ()
        if not self.token.isascii() or not self.token.isprintable():
            raise CredentialsError("the token must be printable ASCII")
        if not self.encrypts and not self.insecure and not _is_local(target):
            raise CredentialsError(f"the token would travel to {target} in plaintext; use TLS, or say insecure")
        return (("authorization", f"Bearer {self.token}"),)

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Contents of ca, key and cert, in the order of ``grpc.ssl_channel_credentials``.

        Raises:
            CredentialsError: a file cannot be used, or cert comes without key.
        """
        if (self.cert is None) != (self.key is None):
            raise CredentialsError("a certificate and its key must be given together")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password="")  # ask nobody at the terminal for one
        except OSError as error:  # SSLError is one
            what = self.ca if self.cert is None else f"{self.cert} and {self.key}, or {self.ca},"
            raise CredentialsError(f"{what} cannot be used: {error.strerror or error}") from error
        ca, key, cert = (None if path is None else _read(path) for path in (self.ca, self.key, self.cert))
        return ca, key, cert


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"cannot read {path}: {error.strerror}") from error


def _path(environment: Mapping[str, str], name: str) -> Path | None:
    value = environment.get(name)
    return Path(value) if value else None


def _is_local(target: str) -> bool:
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.rpartition("/")[2].rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
