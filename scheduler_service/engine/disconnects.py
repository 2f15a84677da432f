"""Notices broken connections of a ROUTER socket as they break. The socket does not say whose they were."""

import zmq
from zmq.utils.monitor import recv_monitor_message

from scheduler_service.engine.sockets import Router


class DisconnectMonitor:
    """Watches one socket; closed with its context."""

    def __init__(self, socket: Router) -> None:
        self.socket = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def take(self) -> bool:
        """Whether any connection has broken since the last call."""
        broken = False
        while self.socket.poll(0):
            recv_monitor_message(self.socket)
            broken = True
        return broken
