"""What the gRPC port shows of itself and asks of callers: TLS, with certificates that may be replaced while it runs."""

import logging
from pathlib import Path

import grpc

from scheduler_service.tls import TlsError, TlsFiles, TlsMaterial

_log = logging.getLogger("baton.api")


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow the files: new connections get the certificate that lies there now.

    Raises:
        TlsError: the files cannot be used.
    """
    source = CertificateSource(files)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(source.material), source.changed, require_client_authentication=files.client_ca is not None
    )


class CertificateSource:
    """Looks at the files whenever a connection begins. Called from gRPC's threads."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        Raises:
            TlsError: they cannot be used.
        """
        self._files = files
        self._version = self._rejected = self._look()
        self.material: TlsMaterial = files.load()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration, if it is another one than before; files that cannot be used change nothing."""
        version = self._look()
        if version == self._version:
            return None
        try:
            self.material = self._files.load()
        except TlsError as error:
            if version != self._rejected:
                _log.error("the certificate stays as it was: %s", error)
            self._rejected = version
            return None
        self._version = version
        _log.info("the certificate was replaced")
        return _configuration(self.material)

    def _look(self) -> tuple[tuple[int, int], ...]:
        files = (self._files.certificate, self._files.key, self._files.client_ca)
        return tuple(_stamp(path) for path in files if path is not None)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_ino, status.st_mtime_ns


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.client_ca
    )
