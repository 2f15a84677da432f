"""What the scheduler reads of a checkpoint: never its weights."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler_service.api.chat_template import ChatTemplate
from scheduler_service.api.tokenizer import ModelTokenizer

_log = logging.getLogger("baton.api")

_NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Checkpoint:
    """The text side of a model.

    Attributes:
        architectures: class names from config.json.
        vocab_size: ids of the model according to config.json; 0 = not stated.
        eos_token_ids: ids that end a sequence.
        tokenizer: None where there is no tokenizer.json; then only token-id prompts work.
        chat_template: None where the checkpoint has none that compiles.
    """

    architectures: tuple[str, ...]
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer: ModelTokenizer | None
    chat_template: ChatTemplate | None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read configuration, tokenizer and chat template.

    Raises:
        FileNotFoundError: ``folder`` is not a directory.
        ValueError: a file is malformed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {folder}")
    config = _read_json(folder / "config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    tokenizer_file = folder / "tokenizer.json"
    tokenizer = ModelTokenizer.from_file(tokenizer_file) if tokenizer_file.exists() else None
    special_tokens = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **tokenizer_config})
    text_config = config.get("text_config", config)
    return Checkpoint(
        architectures=tuple(config.get("architectures") or ()),
        vocab_size=int(text_config.get("vocab_size") or 0),
        eos_token_ids=_eos_token_ids(folder, text_config, special_tokens.get("eos_token"), tokenizer),
        tokenizer=tokenizer,
        chat_template=_chat_template(folder, tokenizer_config, special_tokens),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _NAMED_SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _eos_token_ids(
    folder: Path, text_config: dict[str, Any], eos_token: str | None, tokenizer: ModelTokenizer | None
) -> tuple[int, ...]:
    for config in (_read_json(folder / "generation_config.json"), text_config):
        value = config.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            return tuple(dict.fromkeys(int(token_id) for token_id in ids))
    token_id = tokenizer.token_id(eos_token) if tokenizer is not None and eos_token is not None else None
    return () if token_id is None else (token_id,)


def _chat_template(
    folder: Path, tokenizer_config: dict[str, Any], special_tokens: dict[str, str]
) -> ChatTemplate | None:
    source = _template_source(folder, tokenizer_config)
    if source is None:
        return None
    try:
        return ChatTemplate(source, special_tokens)
    except ValueError as error:
        _log.warning("chat prompts are off: %s", error)
        return None


def _template_source(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():  # as in transformers, the file wins
        return file.read_text(encoding="utf-8")
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):  # named templates
        source = {item.get("name"): item.get("template") for item in source}.get("default")
    return source if isinstance(source, str) else None
