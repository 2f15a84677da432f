"""Makes the keys, certificates and tokens of a cluster whose processes live on several machines.

Files in one directory, secrets readable by their owner only:

- ``scheduler.key``, ``scheduler.pub``: the schedulers' CURVE key pair
- ``executor-NAME.key`` and ``executors/NAME.pub``: an executor's; the folder is the schedulers' allow-list
- ``ca.key``, ``ca.crt``: a certificate authority of the cluster's own
- ``server.key``, ``server.crt``: the gRPC port's certificate
- ``client-NAME.key``, ``client-NAME.crt``: a caller's certificate
- ``token-NAME`` and a line in ``tokens``: a tenant's bearer token, and the schedulers' file of their hashes
"""

import hashlib
import os
import re
import secrets
from pathlib import Path

from baton.errors import BatonError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN_BYTES = 32


class KeysError(BatonError):
    """Something could not be made."""


class KeyDirectory:
    """Makes files in a directory. What is asked for by name is never overwritten unless ``force`` is set; the
    schedulers' key pair and the CA are made once, whenever something first needs them, and kept."""

    def __init__(self, directory: Path, *, force: bool = False) -> None:
        """Make the directory if need be."""
        self.directory = directory
        self._force = force
        self._make_folder(directory, 0o700)

    def scheduler(self) -> None:
        """The schedulers' CURVE key pair, unless it exists."""
        if not self._path("scheduler.key").exists():
            self._write_pair("scheduler.key", "scheduler.pub")

    def executor(self, name: str) -> None:
        """An executor's CURVE key pair, on the allow-list.

        Raises:
            KeysError: it exists, or the name cannot be used.
        """
        self._claim(name, f"executor-{name}.key", f"executors/{name}.pub")
        self.scheduler()
        self._make_folder(self._path("executors"), 0o755)
        self._write_pair(f"executor-{name}.key", f"executors/{name}.pub")

    def server(self, hosts: list[str], days: int) -> None:
        """The gRPC port's certificate, for these host names and addresses.

        Raises:
            KeysError: it exists, or the package ``cryptography`` is not installed.
        """
        self._claim("server", "server.key", "server.crt")
        self._certify("server", hosts[0], days, hosts)

    def client(self, name: str, days: int) -> None:
        """A caller's certificate.

        Raises:
            KeysError: it exists, the name cannot be used, or the package ``cryptography`` is not installed.
        """
        self._claim(name, f"client-{name}.key", f"client-{name}.crt")
        self._certify(f"client-{name}", name, days, [])

    def tenant(self, name: str) -> None:
        """A tenant's token; with ``force`` it replaces those that the tenant has.

        Raises:
            KeysError: it exists, or the name cannot be used.
        """
        self._claim(name, f"token-{name}")
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        known = self._path("tokens").read_text().splitlines() if self._path("tokens").exists() else []
        lines = [line for line in known if line.partition(":")[0].strip() != name]
        lines.append(f"{name}:sha256={hashlib.sha256(token.encode()).hexdigest()}")
        self._write(f"token-{name}", f"{token}\n".encode(), 0o600)
        self._write("tokens", "".join(f"{line}\n" for line in lines).encode(), 0o600)

    def _claim(self, name: str, *files: str) -> None:
        if not _NAME.fullmatch(name):
            raise KeysError(f"{name!r} is no name: 1 to 64 letters, digits, dots, dashes and underscores")
        taken = [str(self._path(file)) for file in files if self._path(file).exists()]
        if taken and not self._force:
            raise KeysError(f"{taken[0]} exists; --force replaces it")

    def _write_pair(self, secret_file: str, public_file: str) -> None:
        try:
            import zmq
        except ImportError as error:
            raise KeysError("making keys needs pyzmq: pip install 'baton[keys]'") from error
        public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
        # The format of ZeroMQ certificates, which zmq.auth reads.
        public_part = f'metadata\ncurve\n    public-key = "{public}"\n'
        self._write(secret_file, f'{public_part}    secret-key = "{secret}"\n'.encode(), 0o600)
        self._write(public_file, public_part.encode(), 0o644)

    def _certify(self, stem: str, name: str, days: int, hosts: list[str]) -> None:
        """A key and a certificate signed by the CA: a server's if there are ``hosts``, else a client's."""
        try:
            from baton import certificates
        except ImportError as error:
            raise KeysError("making certificates needs cryptography: pip install 'baton[keys]'") from error
        if not self._path("ca.key").exists():
            self._write_identity("ca", *certificates.make_authority().pem())
        try:
            authority = certificates.Identity.from_pem(
                self._path("ca.crt").read_bytes(), self._path("ca.key").read_bytes()
            )
            identity = certificates.make_identity(authority, name, days, hosts)
        except (OSError, ValueError, TypeError) as error:  # TypeError: of an encrypted key
            raise KeysError(f"cannot make {self._path(stem)}.crt with {self._path('ca.key')}: {error}") from error
        self._write_identity(stem, *identity.pem())

    def _write_identity(self, stem: str, certificate: bytes, key: bytes) -> None:
        self._write(f"{stem}.key", key, 0o600)
        self._write(f"{stem}.crt", certificate, 0o644)

    def _path(self, file: str) -> Path:
        return self.directory / file

    def _make_folder(self, folder: Path, mode: int) -> None:
        try:
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise KeysError(f"cannot make {folder}: {error.strerror}") from error

    def _write(self, file: str, content: bytes, mode: int) -> None:
        """Write a file whole or not at all; it never has more permissions than ``mode``, not even for a moment."""
        path = self._path(file)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
                out.write(content)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise KeysError(f"cannot write {path}: {error.strerror}") from error
