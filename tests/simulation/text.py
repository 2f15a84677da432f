"""A tokenizer whose tokens are bytes, some of them parts of characters, and the text that a request must give."""

import codecs
from collections.abc import Sequence

from scheduler_service.api.detokenizer import ByteLevelDetokenizer, TokenBytes

VOCAB = 61
_PIECES = [b"a", b"b", b"ab", b"ba", b"c", b" ", b"abc", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"x", b"\n", b"d\xc3"]


def token_bytes(token_id: int) -> bytes:
    """The bytes of a token."""
    return _PIECES[token_id % len(_PIECES)]


class Tokenizer:
    """The part of ModelTokenizer that serving token-id prompts needs, around the real detokenizer."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        self._bytes = TokenBytes(lambda _: None)
        self._bytes.update({token_id: token_bytes(token_id) for token_id in range(VOCAB)})

    def detokenizer(self, *, skip_special_tokens: bool) -> ByteLevelDetokenizer:
        return ByteLevelDetokenizer(self._bytes, frozenset())

    def token_text(self, token_id: int) -> str:
        return token_bytes(token_id).decode(errors="replace")


def expected_text(
    token_ids: Sequence[int], stop_strings: Sequence[str], min_tokens: int, *, include_stop: bool
) -> tuple[int, str, str | None]:
    """How many of the tokens count, the text, and the stop string that ended it: looked for naively, from the start."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    for count, token_id in enumerate(token_ids, 1):
        length = len(text)
        text += decoder.decode(token_bytes(token_id))
        match = _match(text, length, stop_strings) if count > min_tokens else None
        if match is not None:
            start, string = match
            return count, text[: start + len(string) if include_stop else start], string
    return len(token_ids), text + decoder.decode(b"", True), None


def _match(text: str, length: int, stop_strings: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that ends behind ``length``: the first to begin, and of those the longest."""
    found = [
        (start, -len(string), string)
        for string in stop_strings
        for start in range(len(text))
        if text.startswith(string, start) and start + len(string) > length
    ]
    if not found:
        return None
    start, _, string = min(found)
    return start, string
