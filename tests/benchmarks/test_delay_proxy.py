"""The proxy keeps every byte and their order, and nothing comes through before its time."""

import socket
import threading
import time

from benchmarks.processes import Child, python_module

_DELAY_MS = 40
_SIZE = 3_000_000


def _echo(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        while chunk := connection.recv(1 << 16):
            connection.sendall(chunk)


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (chunk := connection.recv(1 << 16)):
        received += chunk
    return received


def test_bytes_come_back_in_order_and_not_too_early() -> None:
    data = bytes(range(256)) * (_SIZE // 256)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        server = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with Child("proxy", python_module("benchmarks.delay_proxy", server, "--round-trip-ms", _DELAY_MS)) as proxy:
            host, _, port = proxy.line(30.0).removeprefix("tcp://").rpartition(":")
            with socket.create_connection((host, int(port))) as connection:
                began = time.monotonic()
                threading.Thread(target=connection.sendall, args=(data,), daemon=True).start()
                assert connection.recv(1) == data[:1]
                assert time.monotonic() - began >= _DELAY_MS / 1e3
                assert _receive(connection, len(data) - 1) == data[1:]
