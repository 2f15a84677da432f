"""The text that the small model learns: Python's standard library, chats about it, their tokens and batches.

Everything is drawn from seeds: the same library gives the same files, chats and order.
"""

from __future__ import annotations

import ast
import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT: Final = "<|endoftext|>"
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, IM_START, IM_END)

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

VOCAB_SIZE: Final = 4096
MICRO_BATCH_TOKENS: Final = 2048

# Qwen's pre-tokenization: words keep the one character before them, digits stand alone, and an indent splits off from
# the word after it, so that each depth of indentation becomes one token. Unlike Qwen's, punctuation does not swallow
# the newline after it, so that a prompt ending in a colon is read as training text was.
PRE_TOKENIZER: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tests, tables of data, code generated for one machine, and deprecated copies of other code.
EXCLUDED: Final = (
    *("site-packages/*", "test/*", "*/test/*", "*/tests/*", "*/test_*.py", "*/idle_test/*", "__phello__/*"),
    *("encodings/*", "pydoc_data/*", "lib2to3/*", "msilib/*", "config-*", "_sysconfigdata*"),
    *("html/entities.py", "re/_casefix.py", "stringprep.py", "this.py"),
)

CHAT_SHARE: Final = 0.12  # of the tokens of an epoch
MAX_CHAT_CHARS: Final = 900
HELD_OUT_SHARE: Final = 0.03  # of the files

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Text of the standard library. `chats` are made from the files of `train` alone."""

    train: list[str]
    held_out: list[str]
    chats: list[str]


def render_chat(user: str, assistant: str) -> str:
    """One question and its answer, as `CHAT_TEMPLATE` renders them."""
    return f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n{assistant}{IM_END}\n"


def library_files(root: Path) -> list[Path]:
    """The standard library's Python files under `root` that are worth reading, in sorted order."""
    files = sorted(root.rglob("*.py"))
    return [path for path in files if not any(fnmatch(path.relative_to(root).as_posix(), p) for p in EXCLUDED)]


def chats_of(module: str, source: str, rng: random.Random) -> Iterator[str]:
    """Questions about the functions and classes of one module, each answered with its source or its docstring."""
    lines = source.split("\n")  # not splitlines, which also splits at form feeds, as the parser does not
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        doc = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        words = node.name.strip("_").replace("_", " ")
        questions: list[tuple[str, str]] = []
        if doc:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            ask = (f"What does `{module}.{node.name}` do?", f"What is the {kind} `{node.name}` for?")
            questions.append((rng.choice(ask), doc))
        if not isinstance(node, ast.ClassDef) and not node.name.startswith("__"):
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            signature = f"{node.name}({ast.unparse(node.args)})"
            asks = [f"Write a function `{signature}`.", f"Write a Python function to {words}."]
            if doc:
                summary = doc.split("\n")[0]
                asks = [f"Write a function `{signature}`. {summary}", f"Write a function: {summary}", *asks]
            questions.append((rng.choice(asks), code))
        yield from (chat for q, a in questions if a and len(chat := render_chat(q, a)) <= MAX_CHAT_CHARS)


def load_corpus(root: Path, seed: int) -> Corpus:
    """Read the library under `root`, set some files aside, and make chats of the others.

    Raises:
        FileNotFoundError: no Python file under `root` (an interpreter that ships its library compiled or zipped).
    """
    paths = library_files(root)
    if not paths:
        raise FileNotFoundError(f"no Python source under {root}; run with a CPython that ships its library's sources")
    rng = random.Random(seed)
    held_out = set(rng.sample(paths, max(1, round(len(paths) * HELD_OUT_SHARE))))
    corpus = Corpus([], [], [])
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace").expandtabs(8)
        if path in held_out:
            corpus.held_out.append(text)
        elif text.strip():
            corpus.train.append(text)
            module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
            corpus.chats.extend(chats_of(module, text, rng))
    return corpus


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens over the training text, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens, fewer than {VOCAB_SIZE}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Token ids of each text, closed by `END_OF_TEXT`."""
    encodings = tokenizer.encode_batch([text + END_OF_TEXT for text in texts], add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]


def to_windows(stream: Tokens, window: int) -> torch.Tensor:
    """Cut a stream into inputs with their successors: int64 (windows, window + 1), consecutive ones share a token."""
    starts = np.arange(0, len(stream) - window, window)
    return torch.from_numpy(np.stack([stream[s : s + window + 1] for s in starts]).astype(np.int64))


class Batches:
    """An endless stream of training batches, drawn from shuffled documents packed end to end.

    Every epoch has all documents once, in a new order and cut at new places, and a new draw of the chats.
    """

    def __init__(self, documents: list[Tokens], chats: list[Tokens], seed: int) -> None:
        self._documents = documents
        self._chats = chats
        self._rng = np.random.default_rng(seed)
        total = sum(map(len, documents))
        chat_total = sum(map(len, chats))
        wanted = total * CHAT_SHARE / (1 - CHAT_SHARE)
        self._chats_per_epoch = min(len(chats), round(len(chats) * wanted / max(chat_total, 1)))
        self.epoch_tokens = round(total + chat_total * self._chats_per_epoch / max(len(chats), 1))

    def _epoch(self, window: int) -> torch.Tensor:
        chosen = self._rng.permutation(len(self._chats))[: self._chats_per_epoch]
        pieces = [*self._documents, *(self._chats[i] for i in chosen)]
        stream = np.concatenate([pieces[i] for i in self._rng.permutation(len(pieces))])
        windows = to_windows(stream[self._rng.integers(window) :], window)
        return windows[torch.from_numpy(self._rng.permutation(len(windows)))]

    def of(self, window: int) -> Iterator[torch.Tensor]:
        """Yield int64 micro-batches (`MICRO_BATCH_TOKENS` / `window`, `window` + 1) without end."""
        size = MICRO_BATCH_TOKENS // window
        while True:
            windows = self._epoch(window)
            for start in range(0, len(windows) - size + 1, size):
                yield windows[start : start + size]
