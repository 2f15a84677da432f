"""Steps that run from recordings give the bits of those that do not."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from executor_service import recorded_steps
from executor_service.models.decoder import CausalLM
from kernels.native import library
from kernels.native.library import available
from kernels.native.memory import Scratch

from .builders import Server, save_checkpoint

pytestmark = pytest.mark.skipif(not available(), reason="no native kernels")

_MAX_TOKENS = 96
_MAX_ROWS = 3
_BLOCK_SIZE = 4


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_step_has_the_same_bits(family: str, tmp_path: Path) -> None:
    """Prompts, decodes of one to four rows, both in one step, rows that come and go, past several tiles of keys; tied
    head or not.
    """
    save_checkpoint(tmp_path, family, tie_word_embeddings=family == "qwen3")
    servers = [Server.start(tmp_path, torch.bfloat16, block_size=_BLOCK_SIZE) for _ in range(2)]
    servers[0].runner.record_steps(_MAX_TOKENS, _MAX_ROWS, max_blocks=60)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 199, 240).tolist() for _ in range(4)]
    runs = [[server.admit(prompt) for prompt in prompts] for server in servers]
    repeated = 0
    for number in range(150):
        rows = [0] if number < 60 else sorted(rng.choice(4, rng.integers(1, 5), replace=False).tolist())
        counts = [int(rng.integers(1, 9)) if number % 5 == 0 and row == rows[0] else 1 for row in rows]
        ours, plain = (
            server.step([(own[row], count) for row, count in zip(rows, counts, strict=True)])
            for server, own in zip(servers, runs, strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        repeated += len(rows) <= _MAX_ROWS and max(counts) == 1
    assert repeated > 80
    assert runs[0][0].computed > 128  # more than two tiles of keys


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("last_only", [True, False])
def test_all_layers_but_the_last_are_recorded_once(
    layers: int, last_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all numbers of tokens and rows, up to the greatest."""
    save_checkpoint(tmp_path, "qwen3", num_hidden_layers=layers)
    recorded, plain = (Server.start(tmp_path, torch.bfloat16, block_size=_BLOCK_SIZE) for _ in range(2))
    expected = []
    steps = [(1, 2), (2, 5), (7,), (1, 94), (96,), (30, 1, 33)]
    for server in (plain, recorded):
        if server is recorded:
            recorded.runner.record_steps(_MAX_TOKENS, _MAX_ROWS, max_blocks=60)
            monkeypatch.setattr(CausalLM, "first_layers", None)
        runs = [server.admit([(number * start) % 199 for number in range(230)]) for start in (3, 5, 7)]
        for counts in steps:
            batch = server.batch(list(zip(runs, counts, strict=False)), last_only=last_only)
            logits = server.runner.compute_logits(batch)
            for run, count in zip(runs, counts, strict=False):
                run.computed += count
            if server is plain:
                expected.append(logits)
            else:
                assert torch.equal(logits, expected.pop(0))
                del logits
    assert not expected


@pytest.mark.parametrize("counts", [(97,), (1, 1, 1, 2)])
def test_a_larger_step_runs_as_always(counts: tuple[int, ...], tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3")
    servers = [Server.start(tmp_path, torch.bfloat16, block_size=_BLOCK_SIZE) for _ in range(2)]
    servers[0].runner.record_steps(_MAX_TOKENS, _MAX_ROWS, max_blocks=60)
    ours, plain = (server.step([(server.admit(range(100)), count) for count in counts]) for server in servers)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_step_that_does_not_sample_every_row_runs_as_always(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3")
    server = Server.start(tmp_path, torch.bfloat16, block_size=_BLOCK_SIZE)
    server.runner.record_steps(_MAX_TOKENS, _MAX_ROWS, max_blocks=60)
    rows = [server.admit(range(start, start + 40)) for start in (0, 50)]
    server.step([(row, 5) for row in rows])
    batch = server.batch([(row, 1) for row in rows])
    both = server.runner.compute_logits(batch).clone()
    assert not torch.equal(both[0], both[1])
    only_second = replace(batch, sample_indices=batch.sample_indices[1:])
    assert torch.equal(server.runner.compute_logits(only_second), both[1:])


def test_results_last_for_as_long_as_anybody_uses_them(tmp_path: Path) -> None:
    """Read on another thread while the next steps run, such as could be repeated were no results in use. Those of a
    repeated step last until the next one.
    """
    save_checkpoint(tmp_path, "qwen3")
    recorded, plain = (Server.start(tmp_path, torch.bfloat16, block_size=_BLOCK_SIZE) for _ in range(2))
    recorded.runner.record_steps(_MAX_TOKENS, _MAX_ROWS, max_blocks=60)
    counts = (9, 1, 1, 1, 70, 1, 1, 1, 1)
    runs = [server.admit([number % 199 for number in range(90)]) for server in (recorded, plain)]
    expected = [plain.step([(runs[1], count)])[0] for count in counts]
    kept: dict[int, torch.Tensor] = {}
    repeated: list[int] = []
    with ThreadPoolExecutor(1) as reader:
        for number, count in enumerate(counts):
            (logits,) = recorded.step([(runs[0], count)])
            assert torch.equal(logits, expected[number])
            if count == 1 and not kept:
                repeated.append(number)
            else:
                kept[number] = logits
            del logits
            assert reader.submit(lambda: all(torch.equal(rows, expected[at]) for at, rows in kept.items())).result()
            if number in {2, 7}:
                kept.clear()
    assert repeated == [3, 8]
    assert list(kept) == []


@pytest.mark.parametrize("rows", [_MAX_TOKENS, 4])
def test_the_largest_step_finds_its_memory_in_place(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all of its tokens are sampled or each request's last one."""
    made: list[Scratch] = []

    def note() -> Scratch:
        made.append(Scratch())
        return made[-1]

    monkeypatch.setattr(recorded_steps, "Scratch", note)
    save_checkpoint(tmp_path, "qwen3", vocab_size=50_000)
    server = Server.start(tmp_path, torch.bfloat16, block_size=_BLOCK_SIZE)
    server.runner.record_steps(_MAX_TOKENS, rows, max_blocks=60)
    reserved = sum(scratch.size for scratch in made)
    assert reserved > rows * 50_000 * torch.float32.itemsize
    tokens = _MAX_TOKENS // rows
    batch = server.batch([(server.admit(range(tokens)), tokens) for _ in range(rows)], last_only=True)
    assert server.runner.compute_logits(batch).shape == (rows, 50_000)
    assert sum(scratch.size for scratch in made) == reserved


@pytest.mark.parametrize("part", ["first_layers", "last_layer"])
@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_model_that_asks_for_values_is_run_as_it_is(
    part: str, from_the_start: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, "qwen3")
    recorded, plain = (Server.start(tmp_path, torch.bfloat16, block_size=_BLOCK_SIZE) for _ in range(2))
    compute = getattr(CausalLM, part)

    def curious(model: CausalLM, *inputs: torch.Tensor | None) -> object:
        first = next(tensor for tensor in inputs if tensor is not None)
        return compute(model, *inputs) if first.float().max().item() < 1e9 else None

    if from_the_start:
        monkeypatch.setattr(CausalLM, part, curious)
    recorded.runner.record_steps(_MAX_TOKENS, _MAX_ROWS, max_blocks=60)
    monkeypatch.setattr(CausalLM, part, curious)
    runs = [server.admit(range(20)) for server in (recorded, plain)]
    for count in (5, 1, 1):
        ours, expected = (server.step([(run, count)]) for server, run in zip((recorded, plain), runs, strict=True))
        assert torch.equal(ours[0], expected[0])
    warned = any("not recorded" in record.message for record in caplog.records)
    assert warned == (from_the_start or part == "last_layer")  # first layers are walked through at the start only


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_kernel_of_a_step_can_be_called_without_python(family: str, tmp_path: Path) -> None:
    """Else its types are missing in replay.cpp, and steps are repeated call by call."""
    save_checkpoint(tmp_path, family)
    server = Server.start(tmp_path, torch.bfloat16, block_size=_BLOCK_SIZE)
    called: dict[str, str] = {}

    def note(function: library.NativeFunction, arguments: tuple[float | None, ...]) -> None:
        called[function.name] = function.letters
        function.call(*arguments)

    with library.noting(note):
        server.step([(server.admit(range(8)), 1)])
        server.runner.compute_logits(server.batch([(server.admit(range(8)), 8)], last_only=True))
    assert len(called) >= 8
    assert [name for name, letters in called.items() if not library.signature(letters)] == []
