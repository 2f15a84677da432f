"""Token ids to text while they arrive: every piece is final, and together they are the text of all ids."""

import codecs
from collections.abc import Callable, Sequence, Set
from typing import Protocol

# A character is at most four bytes; anything held longer than that many ids will not become one.
_MAX_HELD_IDS = 8
_REPLACEMENT = "�"


class Detokenizer(Protocol):
    """The text of one sample."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids; an incomplete character waits for its rest."""

    def flush(self) -> str:
        """What is left at the end of the sample."""


class TokenBytes(dict[int, bytes]):
    """Token id -> the bytes a byte-level BPE token stands for, filled as ids are met; unknown ids have none."""

    def __init__(self, id_to_token: Callable[[int], str | None]) -> None:
        super().__init__()
        self._id_to_token = id_to_token

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id)
        value = b"" if token is None else _token_bytes(token)
        self[token_id] = value
        return value


class ByteLevelDetokenizer:
    """For byte-level BPE, where the text is the UTF-8 decoding of the tokens' bytes: exact, and O(1) per token."""

    def __init__(self, token_bytes: TokenBytes, skipped_ids: Set[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """See Detokenizer."""
        table, skipped = self._token_bytes, self._skipped_ids
        return self._decoder.decode(b"".join([table[i] for i in token_ids if i not in skipped]))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For every other decoder: decodes the ids shown last with and without the new ones and shows the difference.

    Pieces start where a piece ended, so that decoders which treat a text's beginning in a special way (leading space)
    see the same context twice. Invalid byte runs of byte-fallback tokenizers may differ from decoding all ids at once,
    as there later ids change earlier text.
    """

    def __init__(self, decode: Callable[[list[int]], str], skipped_ids: Set[int]) -> None:
        self._decode = decode
        self._skipped_ids = skipped_ids
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """See Detokenizer."""
        self._held += [i for i in token_ids if i not in self._skipped_ids]
        if not self._held:
            return ""
        piece = self._difference()
        incomplete = piece.endswith(_REPLACEMENT) and len(self._held) <= _MAX_HELD_IDS
        return "" if incomplete else self._show(piece)

    def flush(self) -> str:
        """See Detokenizer."""
        return self._show(self._difference()) if self._held else ""

    def _difference(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]

    def _show(self, piece: str) -> str:
        # Ids without text are no context: keep what came before them.
        self._shown = self._held if piece else self._shown + self._held
        self._held = []
        return piece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 is itself, the rest are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return alphabet


_BYTES = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:  # an added token written in plain text
        return token.encode()
