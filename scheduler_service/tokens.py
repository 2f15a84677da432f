"""Bearer tokens of tenants: a file with one ``tenant:token`` to a line."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

_MAX_FILE_BYTES = 1 << 20
_MAX_TOKEN_CHARS = 1024
_MIN_TOKEN_CHARS = 16  # shorter ones can be guessed
_HASHED = "sha256="
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class TokenFileError(ValueError):
    """The file cannot be used; the message is one line that names it and never holds a token."""


@dataclass(frozen=True, slots=True)
class _Entry:
    tenant: str
    digest: bytes  # SHA-256 of the token


class Tokens:
    """Whose token is whose. A tenant may have several, so that one can be replaced while both are valid."""

    def __init__(self, digests: dict[bytes, str]) -> None:
        """Create it from the SHA-256 digests of tokens and their tenants."""
        # Looked up under a key that nobody knows: how long a look-up takes says nothing about any token.
        self._key = secrets.token_bytes(32)
        self._entries = {self._keyed(digest): _Entry(tenant, digest) for digest, tenant in digests.items()}

    def __len__(self) -> int:
        return len(self._entries)

    def tenant(self, token: str) -> str | None:
        """The tenant of a token; None if it is nobody's. Takes the same time whatever the tokens are."""
        if len(token) > _MAX_TOKEN_CHARS:
            return None
        digest = _digest(token)
        entry = self._entries.get(self._keyed(digest))
        return entry.tenant if entry is not None and hmac.compare_digest(entry.digest, digest) else None

    def _keyed(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._key, digest_size=32).digest()


def load_tokens(path: Path) -> Tokens:
    """Read a token file: lines ``tenant:token`` or ``tenant:sha256=<hex digest of the token>``, ``#`` for comments.

    Raises:
        TokenFileError: it cannot be read, or a line is malformed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenFileError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise TokenFileError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    digests: dict[bytes, str] = {}
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            tenant, digest = _parse(line.strip())
            if digests.setdefault(digest, tenant) != tenant:
                raise ValueError("the token is another tenant's already")
        except ValueError as error:
            raise TokenFileError(f"{path}:{number}: {error}") from None
    return Tokens(digests)


def _parse(line: str) -> tuple[str, bytes]:
    tenant, colon, token = (part.strip() for part in line.partition(":"))
    if not colon or not _TENANT.fullmatch(tenant):
        raise ValueError("must be tenant:token; a tenant is 1 to 64 letters, digits, dots, dashes and underscores")
    if token.startswith(_HASHED):
        hexadecimal = token.removeprefix(_HASHED).lower()
        if not _DIGEST.fullmatch(hexadecimal):
            raise ValueError(f"{_HASHED} must be followed by 64 hexadecimal digits")
        return tenant, bytes.fromhex(hexadecimal)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a token must be printable ASCII without spaces")
    if not _MIN_TOKEN_CHARS <= len(token) <= _MAX_TOKEN_CHARS:
        raise ValueError(f"a token must have {_MIN_TOKEN_CHARS} to {_MAX_TOKEN_CHARS} characters")
    return tenant, _digest(token)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
