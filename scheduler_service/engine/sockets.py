"""The engine's ZeroMQ sockets. A peer that is gone or does not read is an error here, never a wait."""

import zmq

Router = zmq.Socket[bytes]

_MAX_FRAME_BYTES = 64 << 20
_FRAMES_PER_TURN = 512  # then the loop looks at its other duties


class PeerUnreachableError(Exception):
    """The socket knows no such peer, or its queue is full."""


def bind_router(context: "zmq.Context[Router]", endpoint: str, high_water_mark: int) -> Router:
    """A ROUTER bound to ``endpoint``, which may end in port 0.

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
    try:
        socket.bind(endpoint)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def bound_endpoint(socket: Router) -> str:
    """Where the socket really listens."""
    return bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()


def receive_some(socket: Router) -> list[tuple[bytes, bytes]]:
    """What has arrived: (routing id, frame) pairs, a bounded number of them."""
    received = []
    for _ in range(_FRAMES_PER_TURN):
        try:
            parts = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            break
        if len(parts) == 2:
            received.append((parts[0], parts[1]))
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
