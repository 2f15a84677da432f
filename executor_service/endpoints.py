"""The schedulers that an executor may join: a list, or names that stand for several."""

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from ipaddress import ip_address

logger = logging.getLogger(__name__)

_RESOLVE_INTERVAL = 5.0  # seconds


class EndpointError(ValueError):
    """The scheduler's endpoint is not one that ZeroMQ can dial."""


def parse(text: str) -> tuple[str, ...]:
    """The endpoints in a list separated by commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def is_name(endpoint: str) -> bool:
    """Whether it is ``tcp://NAME:PORT`` with a name that may stand for several addresses."""
    host = _host(endpoint)
    if not endpoint.startswith("tcp://") or host in {"", "localhost"}:
        return False
    try:
        ip_address(host)
    except ValueError:
        return True
    return False


def resolve(endpoints: Sequence[str]) -> tuple[str, ...]:
    """The endpoints with each name replaced by its addresses. A name that nobody knows now stays as it is."""
    found: dict[str, None] = {}
    for endpoint in endpoints:
        addresses = _addresses(endpoint) if is_name(endpoint) else []
        found.update(dict.fromkeys(addresses or [endpoint]))
    return tuple(found)


class Resolver:
    """Resolves names again and again in a thread of its own, and tells when the answer has changed."""

    def __init__(self, endpoints: Sequence[str], changed: Callable[[tuple[str, ...]], None]) -> None:
        self._endpoints = endpoints
        self._changed = changed
        self._closing = threading.Event()

    def start(self, known: tuple[str, ...]) -> None:
        """Begin; ``known`` is what the caller has now."""
        threading.Thread(target=self._run, args=(known,), name="resolver", daemon=True).start()

    def close(self) -> None:
        """End soon; does not wait."""
        self._closing.set()

    def _run(self, known: tuple[str, ...]) -> None:
        while not self._closing.wait(_RESOLVE_INTERVAL):
            found = resolve(self._endpoints)
            if set(found) != set(known):
                known = found
                self._changed(found)


def _addresses(endpoint: str) -> list[str]:
    port = endpoint.rpartition(":")[2]
    try:
        infos = socket.getaddrinfo(_host(endpoint), port, type=socket.SOCK_STREAM)
    except OSError as error:
        logger.warning("cannot resolve %s: %s", endpoint, error)
        return []
    addresses = [str(info[4][0]) for info in infos]
    # of one family only: a scheduler must not be dialled twice under one identity
    four = [f"tcp://{one}:{port}" for one in addresses if ":" not in one]
    return four or [f"tcp://[{one}]:{port}" for one in addresses]


def _host(endpoint: str) -> str:
    return endpoint.partition("://")[2].rpartition(":")[0].strip("[]")
