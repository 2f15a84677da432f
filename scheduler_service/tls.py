"""Certificate and key of the gRPC port, checked before they are used."""

import ssl
from dataclasses import dataclass
from pathlib import Path

_MAX_FILE_BYTES = 1 << 20


class TlsError(ValueError):
    """The files cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """PEM contents. ``client_ca``: callers must present a certificate that it has signed; None = they need none."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where certificate chain, private key and the callers' CA certificates lie, all PEM."""

    certificate: Path
    key: Path
    client_ca: Path | None

    def load(self) -> TlsMaterial:
        """Read the files.

        Raises:
            TlsError: a file cannot be read, is no PEM, or certificate and key do not belong together.
        """
        material = TlsMaterial(
            _read(self.certificate), _read(self.key), None if self.client_ca is None else _read(self.client_ca)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An encrypted key would make OpenSSL ask for its password on the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise TlsError(f"{self.certificate} and {self.key} are no certificate and its key: {reason}") from error
        if material.client_ca is not None:
            try:
                context.load_verify_locations(cadata=material.client_ca.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise TlsError(f"{self.client_ca} holds no CA certificates") from error
        return material


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise TlsError(f"cannot read {path}: {error.strerror}") from error
    return content
