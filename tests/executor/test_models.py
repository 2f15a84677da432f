"""Logits and greedy tokens of every model family against transformers on the same random checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from executor_service import weights
from executor_service.models import UnsupportedCheckpointError, load_config
from executor_service.models.config import parse_config
from executor_service.weights import load_model

from .builders import CPU, Server, save_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen3-sharded": ("qwen3", {"max_shard_size": "20KB"}),
    "qwen2": ("qwen2", {"num_attention_heads": 14, "head_dim": 24}),
    "qwen2-tied": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "llama": ("llama", {"hidden_size": 40, "num_attention_heads": 20, "num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "hidden_size": 40, "num_attention_heads": 10}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
}


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    family, fields = CHECKPOINTS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    return path, save_checkpoint(path, family, **fields)


def expected_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def test_logits_match_transformers(pair: tuple[Path, Any]) -> None:
    path, reference = pair
    rng = np.random.default_rng(1)
    server = Server.start(path, torch.float32)
    prompts = [rng.integers(0, 199, size).tolist() for size in (150, 1, 33, 64, 17)]

    alone = server.admit(prompts[0])
    (whole,) = server.step([(alone, len(prompts[0]))])
    torch.testing.assert_close(whole, expected_logits(reference, prompts[0]), rtol=0, atol=1e-4)

    runs = [server.admit(prompt) for prompt in prompts]
    parts: list[list[torch.Tensor]] = [[] for _ in runs]
    while pending := [run for run in runs if run.computed < len(run.tokens)]:
        chunks = [(run, int(rng.integers(1, min(40, len(run.tokens) - run.computed) + 1))) for run in pending]
        for (run, _), logits in zip(chunks, server.step(chunks), strict=True):
            parts[runs.index(run)].append(logits)
    for prompt, pieces in zip(prompts, parts, strict=True):
        torch.testing.assert_close(torch.cat(pieces), expected_logits(reference, prompt), rtol=0, atol=1e-4)


def test_greedy_tokens_match_transformers(pair: tuple[Path, Any]) -> None:
    path, reference = pair
    server = Server.start(path, torch.float32)
    prompts = [np.random.default_rng(seed).integers(0, 199, size).tolist() for seed, size in enumerate((20, 70))]
    runs = [server.admit(prompt + [0] * 12) for prompt in prompts]
    counts = [len(prompt) for prompt in prompts]
    for run, prompt in zip(runs, prompts, strict=True):
        run.tokens = list(prompt)
    for _ in range(12):
        parts = list(zip(runs, counts, strict=True))
        sampled = server.runner.run(server.batch(parts, last_only=True))
        assert sampled.row_ok.all()
        for run, count, token in zip(runs, counts, sampled.token_ids.tolist(), strict=True):
            run.computed += count
            run.tokens.append(token)
        counts = [1] * len(runs)
    for prompt, run in zip(prompts, runs, strict=True):
        with torch.no_grad():
            expected = reference.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert run.tokens == expected[0].tolist()


def test_old_style_rope_fields(tmp_path: Path) -> None:
    """Checkpoints published before transformers 5 carry rope_theta and rope_scaling."""
    save_checkpoint(tmp_path, "llama", rope_parameters=LLAMA3)
    raw = json.loads((tmp_path / "config.json").read_text())
    new_style = parse_config(raw)
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    raw["rope_scaling"] = scaling
    raw["torch_dtype"] = raw.pop("dtype")
    assert parse_config(raw) == new_style
    raw["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert parse_config(raw).rope.factor == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported: LlamaForCausalLM"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoints are not supported (gptq)"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rotary parameters per layer type"),
        ({"hidden_size": "wide"}, "holds a value of the wrong type"),
        ({"dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn"),
        ({"num_attention_heads": 5}, "5 attention heads cannot share 2"),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, "(64)"),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": 1}, "(8)"),
    ],
)
def test_unsupported_configs_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_checkpoint(tmp_path, "qwen3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UnsupportedCheckpointError) as raised:
        load_config(tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_disabled_sliding_window_is_accepted(tmp_path: Path) -> None:
    """Published Qwen configs carry a window with use_sliding_window false."""
    save_checkpoint(tmp_path, "qwen3")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert parse_config({**raw, "sliding_window": 64, "use_sliding_window": False, "max_window_layers": 0})
    assert parse_config(
        {**raw, "sliding_window": 64, "use_sliding_window": True, "layer_types": None, "max_window_layers": 2}
    )


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=r"cannot read .*config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedCheckpointError, match="not valid JSON"):
        load_config(tmp_path)
    save_checkpoint(tmp_path, "qwen3")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "vocab_size"}))
    with pytest.raises(UnsupportedCheckpointError, match="lacks 'vocab_size'"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedCheckpointError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path, CPU, None)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UnsupportedCheckpointError, match="cannot read"):
        load_model(tmp_path, CPU, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"lacks tensors: model\.layers\.2\.\S+"),
        ({"num_hidden_layers": 1}, r"has unexpected tensors: model\.layers\.1\.\S+"),
        ({"intermediate_size": 96}, r"down_proj\.weight is \[48, 80\], config\.json says \[48, 96\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_checkpoint(tmp_path, "qwen3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UnsupportedCheckpointError, match=message):
        load_model(tmp_path, CPU, None)


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3", max_shard_size="20KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(UnsupportedCheckpointError, match=r"cannot read .*model-00002"):
        load_model(tmp_path, CPU, None)


def test_stored_copy_of_a_tied_head_is_ignored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = torch.zeros(199, 48)
    save_file(stored, tmp_path / "model.safetensors")
    model = load_model(tmp_path, CPU, None)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])


def test_dtypes(tmp_path: Path) -> None:
    """None takes the checkpoint's dtype; weights convert to another one on the way in."""
    reference = save_checkpoint(tmp_path, "qwen3", dtype="bfloat16")
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        model = load_model(tmp_path, CPU, dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_files_are_mapped_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, "qwen3")
    whole = load_model(tmp_path, CPU, None).state_dict()
    opened: list[Path] = []

    def noted(path: Path, framework: str) -> Any:
        opened.append(path)
        return safe_open(path, framework)

    monkeypatch.setattr(weights, "safe_open", noted)
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 20_000)
    pieces = load_model(tmp_path, CPU, None).state_dict()
    assert len(opened) > 5
    assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.items())
