"""The house promise: a row's logits are the same bits alone and in any batch, chunking, placement and padding."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.batches import greedy
from executor_service import model_runner
from executor_service.input_batch import PromptTargets
from executor_service.metadata.attention import OutputRows

from .builders import Run, Server, save_checkpoint

TINY = {"num_attention_heads": 7, "num_key_value_heads": 1}
WIDE = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
PROMPT = 100


@pytest.fixture(scope="module", params=[TINY, WIDE], ids=["tiny", "wide"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("invariance")
    save_checkpoint(path, "qwen3", **request.param)
    return path


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


def prompt(rng: np.random.Generator, size: int) -> list[int]:
    return [int(token) for token in rng.integers(0, 199, size)]


def run_in_chunks(server: Server, run: Run, counts: Iterator[int], mates: int = 0) -> torch.Tensor:
    """Logits of every token of ``run``, computed in chunks of ``counts``, beside ``mates`` other random requests."""
    others = [server.admit(prompt(server.rng, int(server.rng.integers(1, 90)))) for _ in range(mates)]
    pieces = []
    while run.computed < len(run.tokens):
        parts = [(run, min(next(counts), len(run.tokens) - run.computed))]
        for other in others:
            left = len(other.tokens) - other.computed
            if left:  # chunks, whole prompts and single tokens mixed
                parts.append((other, int(server.rng.choice([1, left, int(server.rng.integers(1, left + 1))]))))
        place = int(server.rng.integers(0, len(parts)))
        parts[0], parts[place] = parts[place], parts[0]
        pieces.append(server.step(parts)[place])
    for other in others:
        server.release(other)
    return torch.cat(pieces)


def random_chunks(rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield int(rng.integers(1, 50))


def always(count: int) -> Iterator[int]:
    while True:
        yield count


@pytest.mark.usefixtures("threads")
def test_rows_do_not_depend_on_their_batch(checkpoint: Path, dtype: torch.dtype) -> None:
    server = Server.start(checkpoint, dtype, num_blocks=1000)
    tokens = prompt(server.rng, PROMPT)
    expected = run_in_chunks(server, server.admit(tokens), always(PROMPT))
    assert torch.isfinite(expected).all()

    by_chunks = run_in_chunks(server, server.admit(tokens), random_chunks(server.rng))
    assert torch.equal(by_chunks, expected)
    among_others = run_in_chunks(server, server.admit(tokens), always(PROMPT), mates=20)
    assert torch.equal(among_others, expected)
    chunks_among_others = run_in_chunks(server, server.admit(tokens), random_chunks(server.rng), mates=20)
    assert torch.equal(chunks_among_others, expected)
    token_by_token = run_in_chunks(server, server.admit(tokens), always(1), mates=3)
    assert torch.equal(token_by_token, expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("selected", ["before attention", "after it"])
def test_rows_do_not_depend_on_which_tokens_are_sampled(
    checkpoint: Path, dtype: torch.dtype, selected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer computes queries of sampled rows only and goes on with these, unless others' hidden states are
    wanted, too. On a GPU it attends for all rows.
    """
    if selected == "after it":
        monkeypatch.setattr(model_runner, "output_rows", lambda batch, indices, *_: OutputRows(indices, None))
    sample_some_tokens(Server.start(checkpoint, dtype))


def sample_some_tokens(server: Server) -> None:
    """Few of a chunk's tokens or none at all, alone or beside hidden states of all: the bits of a prompt as a whole."""
    tokens = prompt(server.rng, 60)
    expected = run_in_chunks(server, server.admit(tokens), always(60))
    run, mate = server.admit(tokens), server.admit(prompt(server.rng, 40))
    for count, sampled in ((20, []), (25, [24]), (1, []), (13, [0, 5, 12])):
        everything = server.batch([(run, count), (mate, 10)])
        targets = PromptTargets(everything.sample_indices, everything.input_ids, 0)
        all_rows = server.runner.compute_logits(replace(everything, prompt_targets=targets))
        assert torch.equal(all_rows[:count], expected[run.computed : run.computed + count])
        indices = torch.tensor(sampled, dtype=torch.int64)
        batch = replace(everything, sample_indices=indices, sampling=greedy(len(sampled)))
        logits = server.runner.compute_logits(batch)
        assert torch.equal(logits, expected[run.computed + indices])
        assert torch.equal(server.runner.run(batch).token_ids, logits.argmax(1))
        for part, computed in ((run, count), (mate, 10)):
            part.computed += computed
    assert torch.equal(server.step([(run, 1)])[0], expected[59:])


@pytest.mark.usefixtures("threads")
def test_rows_do_not_depend_on_the_kind_of_batch(checkpoint: Path, dtype: torch.dtype) -> None:
    """Decoding beside many decodes, or beside one long prefill, or after a prefix hit: the same bits."""
    server = Server.start(checkpoint, dtype, num_blocks=2000)
    tokens = prompt(server.rng, 40)
    alone = server.admit(tokens)
    expected = run_in_chunks(server, alone, always(1))[-1]

    def last_step(run: Run) -> tuple[Run, int]:
        run.computed = 39
        return run, 1

    decodes = [server.admit(prompt(server.rng, int(size))) for size in server.rng.integers(2, 60, 70)]
    for run in decodes:
        server.step([(run, len(run.tokens) - 1)])
    *_, row = server.step([*((run, 1) for run in decodes), last_step(alone)])
    assert torch.equal(row[0], expected)

    long = server.admit(prompt(server.rng, 700))
    row, _ = server.step([last_step(alone), (long, 700)])
    assert torch.equal(row[0], expected)

    # A prefix hit: the first 32 tokens' blocks are shared, the rest is computed anew in other blocks.
    sharing = server.admit(tokens)
    sharing.blocks[:8] = alone.blocks[:8]
    sharing.computed = 32
    (rows,) = server.step([(sharing, 8)])
    assert torch.equal(rows[-1], expected)


@pytest.mark.parametrize("block_size", [1, 16, 48, 64, 128])
def test_rows_do_not_depend_on_block_size(checkpoint: Path, block_size: int) -> None:
    tokens = prompt(np.random.default_rng(0), PROMPT)
    rows = []
    for size in (4, block_size):
        server = Server.start(checkpoint, torch.bfloat16, num_blocks=200, block_size=size)
        rows.append(run_in_chunks(server, server.admit(tokens), random_chunks(server.rng)))
    assert torch.equal(rows[0], rows[1])


def test_a_poisoned_row_spoils_no_other(checkpoint: Path) -> None:
    """NaN logits are reported for their row; its keys and values, even in reused blocks, reach nobody else."""
    server = Server.start(checkpoint, torch.bfloat16, num_blocks=20)
    tokens = prompt(server.rng, 30)
    healthy = server.admit(tokens)
    (expected,) = server.step([(healthy, 30)])
    server.release(healthy)

    poisoned, healthy = server.admit([5] * 30), server.admit(tokens)
    server.step([(poisoned, 10)])
    for cache in (*server.cache.keys, *server.cache.values):
        cache[poisoned.blocks[0]] = torch.nan
    batch = server.batch([(poisoned, 20), (healthy, 30)], last_only=True)
    sampled = server.runner.run(batch)
    assert sampled.row_ok.tolist() == [False, True]
    assert sampled.token_ids.tolist() == [0, int(expected[-1].argmax())]

    server.release(poisoned)
    for _ in range(3):  # through all blocks, the poisoned ones among them
        reusing = server.admit(tokens)
        (rows,) = server.step([(reusing, 30)])
        assert torch.equal(rows, expected)
        server.release(reusing)
