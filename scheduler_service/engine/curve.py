"""CURVE on the executors' port: the scheduler's own key, and the public keys of the executors that may join."""

import logging
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.auth import load_certificate
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

logger = logging.getLogger(__name__)

_DOMAIN = "executors"
_LOOK_INTERVAL = 1.0  # seconds
_MAX_KEYS = 10_000
_KEY_CHARS, _KEY_BYTES = 40, 32  # in Z85, and decoded


class KeyFileError(ValueError):
    """A key file or directory cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class CurveKey:
    """A scheduler's key pair, Z85."""

    public: bytes
    secret: bytes = field(repr=False)

    def protect(self, socket: "zmq.Socket[bytes]") -> None:
        """Have a socket that is not yet bound take none but CURVE connections whose keys are checked."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody there to check a key: nobody gets in


def load_key(path: Path) -> CurveKey:
    """The key pair in a secret key file.

    Raises:
        KeyFileError: it cannot be read, or holds no secret key.
    """
    public, secret = _read(path)
    if secret is None:
        raise KeyFileError(f"{path} holds no secret key")
    return CurveKey(public, secret)


class AllowList:
    """The public keys in the ``*.pub`` files of a directory. A thread follows its changes until ``close``.

    A file that cannot be used counts for nothing; a directory that cannot be read changes nothing.
    """

    def __init__(self, directory: Path) -> None:
        """Read the directory.

        Raises:
            KeyFileError: it cannot be read.
        """
        self._directory = directory
        self._version: tuple[tuple[str, int, int], ...] | None = self._look()  # None = the last look failed
        self._keys = self._load()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="executor keys", daemon=True)
        self._thread.start()

    def __contains__(self, key: object) -> bool:
        """Whether an executor with this key, Z85 text, may speak."""
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def close(self) -> None:
        """Follow no more changes."""
        self._closed.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._closed.wait(_LOOK_INTERVAL):
            self.refresh()

    def refresh(self) -> None:
        """Look at the directory now."""
        try:
            version = self._look()
            if version == self._version:
                return
            keys = self._load()
        except KeyFileError as error:
            if self._version is not None:
                logger.error("the executors' keys stay as they were: %s", error)
            self._version = None
            return
        logger.info("%d executor keys: %d new, %d revoked", len(keys), len(keys - self._keys), len(self._keys - keys))
        self._keys, self._version = keys, version

    def _look(self) -> tuple[tuple[str, int, int], ...]:
        try:
            stats = [(path.name, path.stat()) for path in self._files()]
        except OSError as error:
            raise KeyFileError(f"cannot read {self._directory}: {error.strerror}") from error
        return tuple((name, stat.st_ino, stat.st_mtime_ns) for name, stat in stats)

    def _load(self) -> frozenset[str]:
        keys = set()
        for path in self._files():
            try:
                keys.add(_read(path)[0].decode("ascii"))
            except KeyFileError as error:
                logger.error("an executor's key is ignored: %s", error)
        return frozenset(keys)

    def _files(self) -> list[Path]:
        try:
            names = sorted(path for path in self._directory.iterdir() if path.suffix == ".pub")
        except OSError as error:
            raise KeyFileError(f"cannot read {self._directory}: {error.strerror}") from error
        return names[:_MAX_KEYS]


@contextmanager
def authenticator(context: "zmq.Context[zmq.Socket[bytes]]", allowed: AllowList) -> Iterator[None]:
    """Answer, on a thread of its own, whether the keys that sockets of ``context`` are shown may connect."""
    thread = ThreadAuthenticator(context, log=logger)
    thread.configure_curve_callback(_DOMAIN, _Provider(allowed))
    thread.start()
    try:
        yield
    finally:
        thread.stop()


class _Provider:
    """The allow-list as pyzmq asks it. A refusal is told once per key: executors try again and again."""

    def __init__(self, allowed: AllowList) -> None:
        self._allowed = allowed
        self._refused: set[str] = set()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a key, Z85, may connect."""
        text = key.decode("ascii", "replace")
        if text in self._allowed:
            self._refused.discard(text)
            return True
        if text not in self._refused and len(self._refused) < _MAX_KEYS:
            self._refused.add(text)
            logger.warning("refused an executor with the unknown key %s", text)
        return False


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeyFileError(str(error)) from error
    for key in (public, secret):
        if key is not None and not _is_key(key):
            raise KeyFileError(f"{path} holds a malformed key")
    return public, secret


def _is_key(key: bytes) -> bool:
    try:
        return len(key) == _KEY_CHARS and len(z85.decode(key)) == _KEY_BYTES
    except (KeyError, struct.error):  # a character, or a number, that Z85 does not have
        return False
