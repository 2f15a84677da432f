"""The checkpoint's tokenizer as a gateway fetches it: one zip file."""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Everything that tokenizers are made of, and the configuration that says which class reads it.
_PATTERNS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "*.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "*.tiktoken",
)  # fmt: skip
# Gateways take no more than this.
_MAX_FILES = 50
_MAX_BYTES = 200 * 1024 * 1024
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of zip files: equal files make equal archives


@dataclass(frozen=True, slots=True)
class TokenizerArchive:
    """A zip file and its SHA-256 in hexadecimal digits."""

    data: bytes
    sha256: str


def pack_tokenizer(folder: Path) -> TokenizerArchive:
    """Pack the tokenizer's files of a checkpoint.

    Raises:
        ValueError: there are none, or more than a gateway takes.
        OSError: one cannot be read.
    """
    paths = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})
    if not paths:
        raise ValueError("the checkpoint has no tokenizer")
    if len(paths) > _MAX_FILES or sum(path.stat().st_size for path in paths) > _MAX_BYTES:
        raise ValueError(f"the tokenizer has more than {_MAX_FILES} files or {_MAX_BYTES >> 20} MiB")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.writestr(zipfile.ZipInfo(path.name, _EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    return TokenizerArchive(data, hashlib.sha256(data).hexdigest())
