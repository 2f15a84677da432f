"""A TCP proxy that makes the way to a server longer: half the round trip is added in each direction.

``python -m benchmarks.delay_proxy HOST:PORT --round-trip-ms 10`` prints where it listens. Bytes leave in the order in
which they came, each chunk once it is due; a chunk on its way does not hold up the ones behind it, so that bandwidth
stays what it was. Threads and not an event loop: the wait of epoll is rounded up to whole milliseconds.
"""

import argparse
import queue
import socket
import threading
import time

from benchmarks.figures import run_main
from scheduler_service.process import die_with_parent

_CHUNK = 1 << 18


def serve(listener: socket.socket, server: tuple[str, int], delay: float) -> None:
    """Pass connections on to ``server``, ``delay`` seconds later in each direction; never returns."""
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(server)
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            passing: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            threading.Thread(target=_take_in, args=(one, passing, delay), daemon=True).start()
            threading.Thread(target=_let_out, args=(other, passing), daemon=True).start()


def _take_in(source: socket.socket, passing: "queue.SimpleQueue[tuple[float, bytes]]", delay: float) -> None:
    chunk = b"\0"
    while chunk:  # the empty one tells the other side of the end
        try:
            chunk = source.recv(_CHUNK)
        except OSError:
            chunk = b""
        passing.put((time.monotonic() + delay, chunk))


def _let_out(target: socket.socket, passing: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
    while True:
        due, chunk = passing.get()
        if (wait := due - time.monotonic()) > 0:
            time.sleep(wait)
        try:
            if not chunk:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(chunk)
        except OSError:
            return


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="HOST:PORT, with or without tcp:// before it")
    parser.add_argument("--round-trip-ms", type=float, default=10.0)
    args = parser.parse_args()
    die_with_parent()
    host, _, port = args.server.removeprefix("tcp://").rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"tcp://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    serve(listener, (host, int(port)), args.round_trip_ms / 2e3)


if __name__ == "__main__":
    run_main(main)
