"""Stop strings: found wherever they are, never shown, and the same however tokens are portioned."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_service.api.sample_text import SampleText
from scheduler_service.api.stop_strings import StopFinder, StopMatch, StopStrings
from scheduler_service.api.tokenizer import ModelTokenizer

from .conftest import byte_level_tokenizer

TOKENIZER = ModelTokenizer(byte_level_tokenizer())
LETTERS = st.text(alphabet="ab🙂", min_size=1, max_size=6)


def expected_match(pieces: list[str], strings: list[str], min_tokens: int) -> tuple[int, StopMatch] | None:
    """By definition: the first piece that completes any string, then the earliest start, then the longest."""
    text = ""
    for number, piece in enumerate(pieces, start=1):
        old, text = len(text), text + piece
        found = [
            StopMatch(string, end - len(string), end)
            for string in strings
            for end in range(max(old + 1, len(string)), len(text) + 1)
            if text[end - len(string) : end] == string
        ]
        if found and number > min_tokens:
            return number, min(found, key=lambda match: (match.start, -match.end))
    return None


@settings(deadline=None, max_examples=500)
@given(st.lists(st.text(alphabet="ab🙂", max_size=4), max_size=12), st.lists(LETTERS, min_size=1), st.integers(0, 4))
def test_the_match_is_the_defined_one(pieces: list[str], strings: list[str], min_tokens: int) -> None:
    finder = StopFinder(StopStrings(strings))
    found = None
    for number, piece in enumerate(pieces, start=1):
        match = finder.push(piece, may_stop=number > min_tokens)
        if match is not None:
            found = number, match
            break
    assert found == expected_match(pieces, strings, min_tokens)


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="ab🙂", max_size=30), st.lists(LETTERS, min_size=1))
def test_held_back_is_the_longest_beginning_of_a_stop_string(text: str, strings: list[str]) -> None:
    finder = StopFinder(StopStrings(strings))
    finder.push(text, may_stop=False)
    beginnings = {string[:count] for string in strings for count in range(1, len(string) + 1)}
    held = [count for count in range(1, len(text) + 1) if text[-count:] in beginnings]
    assert finder.held == max(held, default=0)


@pytest.mark.parametrize(
    ("strings", "pieces", "match"),
    [
        (["b"], ["abc"], StopMatch("b", 1, 2)),
        (["abc", "ab"], ["abc"], StopMatch("abc", 0, 3)),  # where both begin at the same place, the longer one
        (["abc", "ab"], ["ab", "c"], StopMatch("ab", 0, 2)),  # but not at the price of another token
        (["bc", "abcd"], ["abcd"], StopMatch("abcd", 0, 4)),  # the earlier one, though it ends later
        (["d", "bc"], ["abcd"], StopMatch("bc", 1, 3)),
        (["aab"], ["aaa", "ab"], StopMatch("aab", 2, 5)),  # across tokens, overlapping itself
    ],
)
def test_which_of_several_counts(strings: list[str], pieces: list[str], match: StopMatch) -> None:
    finder = StopFinder(StopStrings(strings))
    matches = [finder.push(piece, may_stop=True) for piece in pieces]
    assert next(one for one in matches if one is not None) == match


def make(strings: list[str], *, include_stop: bool = False, min_tokens: int = 0) -> SampleText:
    stop = StopStrings(strings) if strings else None
    return SampleText(
        TOKENIZER.detokenizer(skip_special_tokens=True), stop, include_stop=include_stop, min_tokens=min_tokens
    )


def read(text: SampleText, ids: list[int], cut: random.Random) -> list[str]:
    shown = []
    while ids:
        count = cut.choice((1, 1, 2, 7))
        shown.append(text.push(ids[:count]))
        ids = ids[count:]
    return [*shown, text.flush()]


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet="ab é🙂日\n", max_size=40),
    st.lists(st.text(alphabet="ab é🙂日\n", min_size=1, max_size=5), max_size=4),
    st.booleans(),
    st.integers(0, 6),
    st.randoms(use_true_random=False),
)
def test_any_text_in_any_portions(
    text: str, strings: list[str], include_stop: bool, min_tokens: int, cut: random.Random
) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    whole = make(strings, include_stop=include_stop, min_tokens=min_tokens)
    expected = "".join(read(whole, ids, random.Random(0)))
    portioned = make(strings, include_stop=include_stop, min_tokens=min_tokens)
    shown = read(portioned, ids, cut)
    assert "".join(shown) == expected
    assert (portioned.num_tokens, portioned.match) == (whole.num_tokens, whole.match)
    if whole.match is None:
        assert expected == text
        return
    assert expected == text[: whole.match.end if include_stop else whole.match.start]
    # What is left of the tokens up to the match completes it, and one token less does not.
    assert whole.match.text in TOKENIZER.decode(ids[: whole.num_tokens], skip_special_tokens=True)
    assert (
        len(TOKENIZER.decode(ids[: whole.num_tokens - 1], skip_special_tokens=True).rstrip("\ufffd")) < whole.match.end
    )


@pytest.mark.parametrize("stop", ["fox", "the", "dog", "o", "wn fox ju", "🙂", "ß", "日本", "dog 🙂 größer 日本"])
def test_a_stop_string_at_every_place(stop: str) -> None:
    text = "the quick brown fox jumps over the lazy dog 🙂 größer 日本"
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    sample = make([stop])
    shown = ""
    for token_id in ids:
        shown += sample.push([token_id])
        assert text.startswith(shown) and len(shown) <= text.index(stop)
    assert shown == text[: text.index(stop)]


def test_text_is_not_held_longer_than_it_may_become_a_stop_string() -> None:
    sample = make(["xyz"])
    ids = TOKENIZER.encode("axyb", add_special_tokens=False)
    assert [sample.push([token_id]) for token_id in ids] == ["a", "", "", "xyb"]
