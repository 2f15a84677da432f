"""Incremental text is final piece by piece and together equals decoding all ids at once."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from scheduler_service.api.detokenizer import Detokenizer, WindowDetokenizer
from scheduler_service.api.tokenizer import ModelTokenizer

from .conftest import byte_level_tokenizer

EMOJI = "👩‍👩‍👧‍👦🏴󠁧󠁢󠁳󠁣󠁴󠁿🙂é日本"


def make() -> ModelTokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["plain añadido 日", AddedToken("héllo", normalized=False)])
    tokenizer.add_special_tokens(["<특별>"])
    return ModelTokenizer(tokenizer)


TOKENIZER = make()
# A few ids past the vocabulary: models pad theirs.
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=60)
TEXT = st.text(max_size=60) | st.text(alphabet=EMOJI, max_size=20)


def pieces(detokenizer: Detokenizer, ids: list[int], cut: random.Random) -> list[str]:
    """Push ``ids`` in random portions, as a coalescing reader gets them."""
    shown = []
    while ids:
        count = cut.choice((1, 1, 1, 2, 5))
        shown.append(detokenizer.push(ids[:count]))
        ids = ids[count:]
    return [*shown, detokenizer.flush()]


@settings(deadline=None, max_examples=300)
@given(IDS, st.booleans(), st.randoms(use_true_random=False))
def test_random_ids(ids: list[int], skip: bool, cut: random.Random) -> None:
    detokenizer = TOKENIZER.detokenizer(skip_special_tokens=skip)
    assert "".join(pieces(detokenizer, ids, cut)) == TOKENIZER.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=300)
@given(TEXT, st.randoms(use_true_random=False))
def test_random_text(text: str, cut: random.Random) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    shown = pieces(TOKENIZER.detokenizer(skip_special_tokens=False), ids, cut)
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: words with a mark for the space, bytes for all else."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "▁": 257, "a": 258, "b": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=EMOJI + "ab ", min_size=1, max_size=30).filter(lambda text: "▁" not in text))
def test_window_with_byte_fallback(text: str) -> None:
    tokenizer = ModelTokenizer(byte_fallback_tokenizer())
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
    assert isinstance(detokenizer, WindowDetokenizer)
    end = tokenizer.token_id("</s>")
    assert end is not None
    shown = [detokenizer.push([token_id, end]) for token_id in ids] + [detokenizer.flush()]
    assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_invalid_bytes_are_not_held_for_ever(make_tokenizer: type[Tokenizer]) -> None:
    tokenizer = ModelTokenizer(make_tokenizer())
    token = "<0xFF>" if tokenizer.token_id("<0xFF>") is not None else "ÿ"
    bad = tokenizer.token_id(token)
    assert bad is not None
    detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
    assert any(detokenizer.push([bad]) for _ in range(20))
