"""The engine's end towards its api processes: who is attached, and whose request is whose."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.outputs import Outputs
from scheduler_service.engine import api_wire
from scheduler_service.engine.sockets import PeerUnreachableError, Router, receive_some, send

logger = logging.getLogger(__name__)

# A cluster-wide handle is the peer's number in the high bits and the peer's own handle in the low ones.
_PEER_SHIFT = 48
_OWN_HANDLE = (1 << _PEER_SHIFT) - 1
_MAX_PEERS = 1 << 14


class Peer:
    """One attachment of an api process. ``handles`` are its live requests, cluster-wide."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.handles: set[int] = set()

    def cluster_handle(self, handle: int) -> int:
        """The cluster-wide handle of one of the peer's own.

        Raises:
            WireError: the handle is out of range.
        """
        if not 0 <= handle <= _OWN_HANDLE:
            raise api_wire.WireError(f"handle {handle} is out of range")
        return self.number << _PEER_SHIFT | handle


def _is_of(number: int, handles: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which cluster-wide handles are those of the peer with this number."""
    mine: NDArray[np.bool_] = handles >> _PEER_SHIFT == number
    return mine


class ApiPort:
    """Splits outputs by api process. A process that cannot be reached is detached; its requests are ``orphans``."""

    def __init__(self, socket: Router) -> None:
        self.socket = socket
        self.orphans: list[int] = []
        self._peers: dict[bytes, Peer] = {}
        self._routing_ids: dict[int, bytes] = {}
        self._next_number = 0

    def receive(self) -> list[tuple[bytes, bytes]]:
        """What has arrived, as (routing id, frame)."""
        return receive_some(self.socket)

    def peer(self, routing_id: bytes) -> Peer | None:
        """The attachment behind a routing id."""
        return self._peers.get(routing_id)

    def routing_ids(self) -> list[bytes]:
        """All attached processes."""
        return list(self._peers)

    def attach(self, routing_id: bytes) -> None:
        """An api process introduces itself; one that does so again has forgotten its requests."""
        known = self._peers.get(routing_id)
        if known is not None and not known.handles:
            return
        self.detach(routing_id, "it attached anew")
        while self._next_number in self._routing_ids:
            self._next_number = (self._next_number + 1) % _MAX_PEERS
        self._peers[routing_id] = Peer(self._next_number)
        self._routing_ids[self._next_number] = routing_id
        self._next_number = (self._next_number + 1) % _MAX_PEERS

    def detach(self, routing_id: bytes, reason: str) -> None:
        """Forget an api process; its requests become orphans."""
        peer = self._peers.pop(routing_id, None)
        if peer is None:
            return
        del self._routing_ids[peer.number]
        self.orphans.extend(sorted(peer.handles))
        if peer.handles:
            fields = {
                "api_process": routing_id.decode(errors="replace"),
                "reason": reason,
                "requests": len(peer.handles),
            }
            logger.warning("api process detached, its requests end", extra=fields)

    def send(self, routing_id: bytes, frame: bytes) -> None:
        """Send a frame, or detach the process."""
        try:
            send(self.socket, routing_id, frame)
        except PeerUnreachableError as error:
            self.detach(routing_id, str(error))

    def broadcast(self, frame: bytes, but: bytes = b"") -> None:
        """Send a frame to all processes, ``but`` one."""
        for routing_id in self.routing_ids():
            if routing_id != but:
                self.send(routing_id, frame)

    def deliver(self, outputs: Outputs) -> None:
        """Send each process its part of what became known."""
        owners = set(np.flatnonzero(np.bincount(outputs.handles >> _PEER_SHIFT)).tolist())
        for news in (outputs.finished, outputs.prompt_logprobs):
            owners.update(item.handle >> _PEER_SHIFT for item in news)
        owners.update(handle >> _PEER_SHIFT for handle in outputs.best_effort_handles)
        for number in sorted(owners):  # among them may be processes that are gone
            self._deliver_part(number, outputs if len(owners) == 1 else outputs.part(partial(_is_of, number)))

    def _deliver_part(self, number: int, part: Outputs) -> None:
        routing_id = self._routing_ids.get(number)
        if routing_id is None:
            return
        self._peers[routing_id].handles.difference_update(end.handle for end in part.finished)
        own = replace(
            part,
            handles=part.handles & _OWN_HANDLE,
            finished=[replace(end, handle=end.handle & _OWN_HANDLE) for end in part.finished],
            prompt_logprobs=[replace(item, handle=item.handle & _OWN_HANDLE) for item in part.prompt_logprobs],
            best_effort_handles=[handle & _OWN_HANDLE for handle in part.best_effort_handles],
        )
        self.send(routing_id, api_wire.encode_outputs(own))
