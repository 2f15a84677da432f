"""Whole models with int8 weights, in this process and as a cluster serves them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from executor_service.models import load_config
from kernels.linear import Quantization
from kernels.native.library import available

from .builders import Server, save_checkpoint
from .test_invariance import always, prompt, random_chunks, run_in_chunks, sample_some_tokens

pytestmark = pytest.mark.skipif(not available(), reason="no native kernels")


def quantise_exactly(checkpoint: Path) -> None:
    """Rewrite every matrix as whole numbers up to 127 times a power of two per row: int8 loses nothing of them."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            step = torch.exp2((tensor.abs().amax(1, keepdim=True) / 127).log2().ceil())
            whole = (tensor / step).round()
            whole[:, 0] = 127  # so that the row's scale is that step
            tensors[name] = whole * step
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8")
    save_checkpoint(path, "qwen3", tie_word_embeddings=request.param, attention_bias=True)
    quantise_exactly(path)
    return path


def test_weights_that_fit_give_the_same_logits(checkpoint: Path) -> None:
    tokens = prompt(np.random.default_rng(0), 60)
    logits = []
    for quantization in ("none", "int8"):
        server = Server.start(checkpoint, torch.bfloat16, quantization=quantization)
        logits.append(run_in_chunks(server, server.admit(tokens), always(60)))
    plain, quantised = logits
    torch.testing.assert_close(quantised, plain, rtol=0.02, atol=0.02 * float(plain.std()))


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_their_batch(checkpoint: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        server = Server.start(checkpoint, torch.bfloat16, num_blocks=1000, quantization="int8")
        tokens = prompt(server.rng, 100)
        expected = run_in_chunks(server, server.admit(tokens), always(100))
        assert expected.isfinite().all()
        for chunks, mates in [(random_chunks(server.rng), 0), (always(100), 20), (always(1), 3)]:
            assert torch.equal(run_in_chunks(server, server.admit(tokens), chunks, mates), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(
    ("head_dim", "recorded"), [(16, False), (16, True), (24, False)], ids=["native", "recorded", "reference attention"]
)
def test_rows_do_not_depend_on_which_tokens_are_sampled(
    quantization: Quantization, head_dim: int, recorded: bool, tmp_path: Path
) -> None:
    """Weights of queries are whole blocks of a matrix here, so that the last layer can do without other rows'."""
    save_checkpoint(tmp_path, "qwen3", num_attention_heads=8, head_dim=head_dim, attention_bias=True)
    server = Server.start(tmp_path, torch.bfloat16, quantization=quantization)
    if recorded:
        server.runner.record_steps(max_tokens=96, max_rows=3, max_blocks=60)
    sample_some_tokens(server)


def test_no_weight_is_held_twice(checkpoint: Path) -> None:
    """Nothing of two dimensions stays a parameter, but an embedding that is read by itself."""
    server = Server.start(checkpoint, torch.bfloat16, quantization="int8")
    held = {name for name, value in server.runner._model.named_parameters() if value.ndim == 2}
    assert held == (set() if load_config(checkpoint).tie_word_embeddings else {"embed_tokens.weight"})
