"""CURVE towards the scheduler: this executor's key pair, and the scheduler's public key."""

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import zmq
from zmq.auth import load_certificate


class KeyFileError(ValueError):
    """A key file cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """Keys in Z85. A scheduler that does not own the secret half of ``scheduler`` gets not a word."""

    public: bytes
    secret: bytes = field(repr=False)
    scheduler: bytes

    def protect(self, socket: "zmq.Socket[bytes]") -> None:
        """Have a socket that has not dialled yet speak encrypted only.

        Raises:
            KeyFileError: a key is malformed.
        """
        try:
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
            socket.setsockopt(zmq.CURVE_SERVERKEY, self.scheduler)
        except zmq.ZMQError as error:
            raise KeyFileError("a key is not 40 characters of Z85") from error


def load_keys(own: Path, scheduler: Path) -> CurveKeys:
    """Read this executor's secret key file and the scheduler's public one.

    Raises:
        KeyFileError: one of them cannot be read, or holds no such key.
    """
    public, secret = _read(own)
    if secret is None:
        raise KeyFileError(f"{own} holds no secret key")
    return CurveKeys(public, secret, _read(scheduler)[0])


def is_local(endpoint: str) -> bool:
    """Whether a ZeroMQ endpoint is on this machine."""
    scheme, _, address = endpoint.partition("://")
    if scheme != "tcp":
        return scheme in {"ipc", "inproc"}
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeyFileError(str(error)) from error
    return public, secret
