"""The checkpoint's tokenizer, through the `tokenizers` library (importing transformers would load torch)."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders

from scheduler_service.api.detokenizer import (
    ByteLevelDetokenizer,
    Detokenizer,
    TokenBytes,
    WindowDetokenizer,
)


class ModelTokenizer:
    """Text <-> token ids, as transformers does it for the same tokenizer.json. Safe to use from several threads.

    Attributes:
        vocab_size: ids, added tokens included.
        special_ids: ids that ``skip_special_tokens`` leaves out of text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._token_bytes = TokenBytes(tokenizer.id_to_token)
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_file(cls, path: Path) -> "ModelTokenizer":
        """Load tokenizer.json.

        Raises:
            ValueError: the file is not a tokenizer.
        """
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``; ``add_special_tokens`` lets the tokenizer's post-processor add its own."""
        # The batch call releases the GIL and skips the offsets: three times faster than encode().
        encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encodings[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ``token_ids``; ids without a token have none."""
        # As in encode: only the batch call releases the GIL.
        texts: list[str] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return texts[0]

    def token_text(self, token_id: int) -> str:
        """Text of one token within a text, special or not; bytes that are no whole characters show as U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            if self._byte_level:
                text = self._token_bytes[token_id].decode(errors="replace")
            else:  # behind another one: decoders may treat a text's beginning in a special way
                alone = self.decode([token_id], skip_special_tokens=False)
                text = self.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :]
            self._token_texts[token_id] = text
        return text

    def token_id(self, token: str) -> int | None:
        """The id of ``token``, None if there is no such token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A fresh incremental decoder for one sample."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        if self._byte_level:
            return ByteLevelDetokenizer(self._token_bytes, skipped)
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens=False), skipped)
