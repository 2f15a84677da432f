"""The gRPC port: taken for sure before any process is started with it."""

import errno
import socket
from types import TracebackType


class PortInUseError(OSError):
    """Somebody else listens there, or the address is not ours."""


class PortReservation:
    """Keeps a port shared among our own processes from being taken by others while the reservation lasts."""

    def __init__(self, port: int, guard: socket.socket | None) -> None:
        self.port = port
        self._guard = guard

    def __enter__(self) -> "PortReservation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._guard is not None:
            self._guard.close()


def reserve_port(host: str, port: int, *, shared: bool) -> PortReservation:
    """Find out that ``port`` (0 = any) is free by binding it exclusively; ``shared``: several processes will bind it.

    gRPC's own SO_REUSEPORT would let two schedulers listen on one port and split its connections.

    Raises:
        PortInUseError: it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: TIME_WAIT is no obstacle
            probe.bind((host, port))
            probe.listen()
            port = probe.getsockname()[1]
        return PortReservation(port, _guard(family, host, port) if shared else None)
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise PortInUseError(f"cannot listen on {host}:{port}: {reason}") from error


def _guard(family: int, host: str, port: int) -> socket.socket:
    """Bound but not listening: it gets no connections, and others without SO_REUSEPORT cannot bind."""
    guard = socket.socket(family, socket.SOCK_STREAM)
    guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    guard.bind((host, port))
    return guard
