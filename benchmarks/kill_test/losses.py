"""Loses ZeroMQ messages whole on their way through a proxy, as a network without retransmission would.

ZMTP 3.x (rfc.zeromq.org/spec/23): a greeting of 64 bytes, then frames of a byte of flags, a length, and a body.
"""

import random

_GREETING = 64
_MORE, _LONG, _COMMAND = 1, 2, 4


class LossyWay:
    """One direction of one connection; handshakes and other commands always come through.

    Only where messages are not encrypted: CURVE notices that one is missing, and breaks the connection.
    """

    def __init__(self, share: float, seed: int) -> None:
        """``share`` of the messages is lost, chosen at random from ``seed``."""
        self._share = share
        self._rng = random.Random(seed)
        self._buffer = b""
        self._greeting_left = _GREETING

    def take(self, chunk: bytes) -> bytes:
        """What comes out at the other end when ``chunk`` goes in; a frame goes on once it is whole."""
        # Not held back: each side waits for the first bytes of the other's before it sends the rest.
        out, chunk = chunk[: self._greeting_left], chunk[self._greeting_left :]
        self._greeting_left -= len(out)
        self._buffer += chunk
        while self._buffer and (size := self._frame_size()) <= len(self._buffer):
            is_single = not self._buffer[0] & (_MORE | _COMMAND)
            if not (is_single and self._rng.random() < self._share):
                out += self._buffer[:size]
            self._buffer = self._buffer[size:]
        return out

    def _frame_size(self) -> int:
        """Bytes of the frame that comes next; more than there are if its length is not known yet."""
        head = 9 if self._buffer and self._buffer[0] & _LONG else 2
        if len(self._buffer) < head:
            return head
        return head + int.from_bytes(self._buffer[1:head], "big")
