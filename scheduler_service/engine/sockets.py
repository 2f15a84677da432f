"""The engine's ZeroMQ sockets. A peer that is gone or does not read is an error here, never a wait."""

from collections.abc import Container
from typing import TYPE_CHECKING

import zmq

if TYPE_CHECKING:  # loaded where keys are used only
    from scheduler_service.engine.curve import CurveKey

Router = zmq.Socket[bytes]

_MAX_FRAME_BYTES = 64 << 20
_FRAMES_PER_TURN = 512  # then the loop looks at its other duties
_HANDSHAKE_MS = 5_000  # strangers that connect and say nothing are sent away


class PeerUnreachableError(Exception):
    """The socket knows no such peer, or its queue is full."""


def bind_router(
    context: "zmq.Context[Router]", endpoint: str, high_water_mark: int, curve: "CurveKey | None" = None
) -> Router:
    """A ROUTER bound to ``endpoint``, which may end in port 0; with ``curve`` it takes encrypted connections only.

    Raises:
        zmq.ZMQError: the endpoint cannot be bound.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects takes over from its half-open connection
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    if curve is not None:
        curve.protect(socket)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def bound_endpoint(socket: Router) -> str:
    """Where the socket really listens."""
    return bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()


def receive_some(socket: Router, allowed: Container[str] | None = None) -> list[tuple[bytes, bytes]]:
    """What has arrived: (routing id, frame) pairs, a bounded number of them.

    Args:
        socket: a ROUTER.
        allowed: on a socket with CURVE, the keys whose frames are wanted: a key may be revoked while its owner is
            connected.
    """
    if allowed is not None:
        return _receive_from(socket, allowed)
    received = []
    for _ in range(_FRAMES_PER_TURN):
        try:
            parts = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            break
        if len(parts) == 2:
            received.append((parts[0], parts[1]))
    return received


def _receive_from(socket: Router, allowed: Container[str]) -> list[tuple[bytes, bytes]]:
    received = []
    for _ in range(_FRAMES_PER_TURN):
        try:
            parts = socket.recv_multipart(zmq.NOBLOCK, copy=False)  # only such frames know their sender's key
        except zmq.Again:
            break
        if len(parts) == 2 and parts[1].get("User-Id") in allowed:
            received.append((parts[0].bytes, parts[1].bytes))
    return received


def send(socket: Router, routing_id: bytes, frame: bytes) -> None:
    """Queue a frame for a peer.

    Raises:
        PeerUnreachableError: it is gone, or has not read for a queue's length.
    """
    try:
        socket.send_multipart((routing_id, frame), zmq.NOBLOCK)
    except zmq.ZMQError as error:
        raise PeerUnreachableError(error.strerror) from error
