"""``python -m scheduler_service.api.structured_worker tokenizer.json MAX-BYTES EOS-ID...``: compiles grammars.

Compiling can take any time and memory and cannot be interrupted, so it happens in a process that may be killed. Lines
of JSON come on stdin and are answered in order on stdout: ``{"kind", "texts"}`` (see ``StructuredOutput``) by
``{"grammar"}`` or ``{"error"}``, and ``{"grammar", "token_ids"}`` by ``{"is_over"}``. The first line on stdout, ``{}``
or ``{"error"}``, says if the tokenizer is there.
"""

import json
import re
import resource
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from baton_protos.grammars import MAX_LEXER_STATES
from scheduler_service.api.request import StructuredKind
from scheduler_service.process import die_with_parent

_MAX_ERROR_CHARS = 1000
# An executor's threads may have as little: what would overflow theirs must overflow here.
_STACK_BYTES = 2 * 1024 * 1024
# JSON is written on one line. At most one space follows a separator: models are used to it, and where nothing else is
# unbounded, whitespace is not either. A schema's own "x-guidance" overrides this.
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_ANY_OBJECT = '{"type": "object"}'
# The library would have to take back tokens that have been sent.
_STOP_ATTRIBUTE = re.compile(r"\[[^\]]*\bstop\s*=")


def convert(kind: StructuredKind, texts: list[str]) -> str:
    """The llguidance grammar of a structured output, not yet compiled.

    Raises:
        ValueError: the schema is not JSON or not an object, or a grammar uses what is not supported.
    """
    match kind:
        case StructuredKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(texts[0], defaults=_JSON_STYLE)
        case StructuredKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema(_ANY_OBJECT, defaults=_JSON_STYLE)
        case StructuredKind.REGEX:
            return LLMatcher.grammar_from_regex(texts[0])
        case StructuredKind.CHOICE:
            return LLMatcher.grammar_from_regex("|".join(map(_literal, texts)))
        case StructuredKind.GRAMMAR:
            if _STOP_ATTRIBUTE.search(texts[0]):
                raise ValueError("the attribute stop= is not supported; suffix= is")
            return LLMatcher.grammar_from_lark(texts[0])


def compile_error(tokenizer: LLTokenizer, grammar: str) -> str:
    """What is wrong with a grammar, in words; empty if it compiles and allows a first token."""
    matcher = _matcher(tokenizer, grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()  # lexers are built when they are first used
    reason = matcher.get_error().replace("<non-verbose/>", "").strip()
    return "matches no text" if reason == "NoExtensionBias" else reason


def is_over(tokenizer: LLTokenizer, grammar: str, token_ids: list[int]) -> bool:
    """Whether ``token_ids`` are a text of the grammar that nothing can follow."""
    matcher = _unused_matcher(tokenizer, grammar).deep_copy()
    return all(map(matcher.consume_token, token_ids)) and matcher.is_stopped()


@lru_cache(maxsize=1)  # a request asks about all its samples
def _unused_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    return _matcher(tokenizer, grammar)


def _matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def _literal(text: str) -> str:
    """A regular expression that matches ``text`` only."""
    return "".join(one if one.isascii() and one.isalnum() else f"\\x{{{ord(one):x}}}" for one in text)


def _answer(tokenizer: LLTokenizer, line: str) -> dict[str, str | bool]:
    job = json.loads(line)
    if "token_ids" in job:
        return {"is_over": is_over(tokenizer, job["grammar"], job["token_ids"])}
    _unused_matcher.cache_clear()  # the memory is for the new one
    try:
        grammar = convert(StructuredKind(job["kind"]), job["texts"])
    except ValueError as error:
        return {"error": str(error)[:_MAX_ERROR_CHARS]}
    if problem := compile_error(tokenizer, grammar):
        return {"error": problem[:_MAX_ERROR_CHARS]}
    return {"grammar": grammar}


def _limit_memory(max_bytes: int) -> None:
    """Bound what is taken from now on. Linux only; elsewhere only the time is bounded."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))


def _say(message: Mapping[str, str | bool]) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    """Answer until stdin ends; the exit code."""
    die_with_parent()
    try:
        eos_token_ids = [int(token_id) for token_id in sys.argv[3:]]
        tokenizer = LLTokenizer(Path(sys.argv[1]).read_text(encoding="utf-8"), eos_token=eos_token_ids)
    except ValueError as error:
        _say({"error": str(error)[:_MAX_ERROR_CHARS]})
        return 1
    _limit_memory(int(sys.argv[2]))
    _say({})
    for line in sys.stdin:
        _say(_answer(tokenizer, line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
