"""A whole model through the GPU's kernels, interpreted: against the torch reference, and bit by bit in exact mode."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from executor_service.batch_dimensions import BatchDimensions
from executor_service.cuda_graphs import EagerCapturer
from executor_service.kv_cache import KVCache
from executor_service.model_runner import ModelRunner
from executor_service.weights import load_model
from kernels.gpu import library

from .builders import CPU, Server, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu-model")
    save_checkpoint(path, "qwen3", num_hidden_layers=2, hidden_size=32, intermediate_size=40, num_attention_heads=4)
    return path


def serve(checkpoint: Path, exact: bool = False) -> Server:
    server = Server.start(checkpoint, torch.float32, num_blocks=60)
    if exact:
        model = load_model(checkpoint, CPU, torch.float32)
        cache = KVCache.allocate(model.config, 60, 4, CPU, torch.float32)
        server.runner, server.cache = ModelRunner(model, cache, "triton", exact=True), cache
    return server


def test_the_same_logits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, a chunk beside a decode, then decodes alone, eagerly and through static buffers."""
    prompts = [list(range(3, 20)), list(range(40, 50))]
    steps = [((0, 16), (1, 4)), ((0, 1), (1, 5)), ((1, 1),)]

    def run(server: Server) -> list[torch.Tensor]:
        requests = [server.admit(tokens) for tokens in prompts]
        return [torch.cat(server.step([(requests[one], count) for one, count in step])) for step in steps]

    expected = run(serve(checkpoint))
    monkeypatch.setattr(library, "interpreted", lambda: True)
    server = serve(checkpoint)
    assert server.runner.attention == "triton"
    for logits, reference in zip(run(server), expected, strict=True):
        torch.testing.assert_close(logits, reference, rtol=2e-5, atol=2e-5)
    graphed = serve(checkpoint)
    graphed.runner.capture([BatchDimensions(8, 2, 0), BatchDimensions(2, 0, 2)], 12, EagerCapturer())
    for logits, reference in zip(run(graphed), expected, strict=True):
        torch.testing.assert_close(logits, reference, rtol=2e-5, atol=2e-5)


def test_exact_rows_do_not_depend_on_their_batch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "interpreted", lambda: True)
    server = serve(checkpoint, exact=True)
    assert server.runner.attention == "triton:exact"
    tokens = list(range(60, 71))
    (expected,) = server.step([(server.admit(tokens), 11)])
    chunked, other = server.admit(tokens), server.admit(list(range(100, 130)))
    pieces = [
        server.step([(other, 7), (chunked, 4)])[1],
        server.step([(chunked, 1)])[0],
        server.step([(chunked, 6), (other, 1)])[0],
    ]
    assert torch.equal(torch.cat(pieces), expected)
