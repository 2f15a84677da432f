"""The text that the model in the box has learnt, from a small library."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from jinja2 import Template

from baton.checkpoints import TINY_PYTHON, library_text
from baton.checkpoints.library_text import CHAT_TEMPLATE, Batches, chats_of, load_corpus, render_chat

MODULE = '''
class Stack:
    """A pile."""

    def push(self, value):
        self.values.append(value)
'''


def write(root: Path, name: str, text: str = MODULE) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_chats_are_what_the_checkpoint_renders() -> None:
    assert json.loads((TINY_PYTHON / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert Template(CHAT_TEMPLATE).render(messages=messages) == render_chat("a", "b")
    chats = list(chats_of("pile", MODULE, random.Random(0)))
    assert len(chats) == 2
    assert chats[0].endswith("\nA pile.<|im_end|>\n")
    assert chats[1].endswith("\ndef push(self, value):\n    self.values.append(value)<|im_end|>\n")


def test_a_seed_chooses_what_is_held_out(tmp_path: Path) -> None:
    for name in (*(f"m{index}.py" for index in range(6)), "test/test_m.py", "site-packages/x.py"):
        write(tmp_path, name)
    corpus = load_corpus(tmp_path, 3)
    assert (len(corpus.train), len(corpus.held_out), len(corpus.chats)) == (5, 1, 10)
    assert load_corpus(tmp_path, 3) == corpus
    with pytest.raises(FileNotFoundError, match="no Python source"):
        load_corpus(tmp_path / "nowhere", 3)


def test_an_epoch_has_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_text, "MICRO_BATCH_TOKENS", 8)
    document = np.arange(1, 41, dtype=np.uint16)
    batches = Batches([document], [], seed=0)
    assert batches.epoch_tokens == 40
    first = next(batches.of(4))
    assert first.shape == (2, 5)
    windows = batches._epoch(4)
    inputs = windows[:, :-1].flatten().tolist()
    assert len(set(inputs)) == len(inputs) >= 32
    assert (windows[:, 1:] - windows[:, :-1]).unique().tolist() == [1]
