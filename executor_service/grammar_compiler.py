"""Makes grammar matchers over the checkpoint's vocabulary."""

import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from baton_protos.grammars import MAX_LEXER_STATES

logger = logging.getLogger(__name__)

_MAX_TEMPLATES = 64


class GrammarError(Exception):
    """A grammar cannot be used: it does not compile, or there is no tokenizer."""


class GrammarCompiler:
    """Compiles grammars; equal ones once. For one thread."""

    def __init__(self, checkpoint: Path, vocab_size: int) -> None:
        """Read the vocabulary, which takes a second or two for a large one, and holds the GIL: not while steps run.

        Args:
            checkpoint: its tokenizer.json is read, and the end-of-sequence ids of its configuration. Where they cannot
                be used, no grammar can.
            vocab_size: ids of the model; those that the tokenizer does not have are never allowed.
        """
        self._tokenizer: LLTokenizer | None = None
        self._templates: OrderedDict[str, LLMatcher] = OrderedDict()
        try:
            self._tokenizer = _load_tokenizer(checkpoint, vocab_size)
        except (OSError, ValueError) as error:
            logger.warning("no grammars: the tokenizer cannot be used: %s", first_line(str(error)))

    def matcher(self, grammar: str, output: list[int]) -> LLMatcher:
        """A matcher that has taken the tokens of ``output``; it is in its error state if the grammar has others.

        Raises:
            GrammarError: see the class.
        """
        matcher = self._template(grammar).deep_copy()
        matcher.consume_tokens(output)
        return matcher

    def _template(self, grammar: str) -> LLMatcher:
        if (known := self._templates.get(grammar)) is not None:
            self._templates.move_to_end(grammar)
            return known
        if self._tokenizer is None:
            raise GrammarError("there is no tokenizer to use grammars with")
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"the grammar does not compile: {first_line(matcher.get_error())}")
        self._templates[grammar] = matcher
        if len(self._templates) > _MAX_TEMPLATES:
            self._templates.popitem(last=False)
        return matcher


def first_line(message: str) -> str:
    """What fits into a log."""
    return (message.splitlines() or [""])[0][:200]


def _load_tokenizer(checkpoint: Path, vocab_size: int) -> LLTokenizer:
    text = (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    return LLTokenizer(text, n_vocab=vocab_size, eos_token=_eos_token_ids(checkpoint, text))


def _eos_token_ids(checkpoint: Path, tokenizer: str) -> list[int]:
    """The ids that the scheduler ends requests at, found where it finds them."""
    config = _read_json(checkpoint / "config.json")
    for source in (_read_json(checkpoint / "generation_config.json"), config.get("text_config", config)):
        value = source.get("eos_token_id")
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    named = _read_json(checkpoint / "tokenizer_config.json").get("eos_token")
    content = named.get("content") if isinstance(named, dict) else named
    return [token["id"] for token in json.loads(tokenizer).get("added_tokens", ()) if token["content"] == content]


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content
