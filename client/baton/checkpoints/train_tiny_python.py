"""Train the small model that ships with Baton, from scratch, on Python's own standard library.

    python -m baton.checkpoints.train_tiny_python --out DIR [--minutes 40] [--threads 2] [--seed 0]

The result is a Hugging Face checkpoint directory (Qwen3, bfloat16, about 10 MB): model, tokenizer, chat template and
a model card with the figures of the run. Training is sized for a few CPU cores: the learning rate follows the clock,
so whatever the machine, the schedule completes when the time is up. For the same reason two runs with one seed see the
same data in the same order but differ in the number of steps.

Needs torch, transformers and tokenizers (``pip install 'baton[executor,dev]'``), and a C++ compiler unless
``--no-compile`` is given.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from baton.checkpoints._directory import checkpoint_directory, write_json
from baton.checkpoints.library_text import (
    CHAT_SHARE,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    MICRO_BATCH_TOKENS,
    VOCAB_SIZE,
    Batches,
    encode,
    load_corpus,
    to_windows,
    train_tokenizer,
)

MAX_POSITIONS: Final = 2048
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": MAX_POSITIONS,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}

TOKENS_PER_STEP: Final = 4096
# Most of the time goes into short windows, which are cheap and varied; the rest teaches the longer distances.
PHASES: Final = ((0.8, 256), (1.0, 1024))  # (until this share of the time, window in tokens)
WARM_UP_STEPS: Final = 100
MUON_LR: Final = 0.02
ADAM_LR: Final = 3e-3
EVAL_WINDOWS: Final = 48

PROMPTS: Final = (
    "def read_json(path):",
    "class Stack:\n",
    "import os\nimport sys\n\ndef main():\n",
)
CHAT: Final = "Write a function `read_lines(path)`. Return the lines of the file."


@dataclass(frozen=True)
class Run:
    """Figures of one training run, for the model card. Losses are in nats per token."""

    minutes: float
    steps: int
    tokens: int
    epochs: float
    parameters: int
    train_files: int
    train_tokens: int
    held_out_files: int
    held_out_loss: float
    held_out_bits_per_byte: float


def log(message: str) -> None:
    """Write one line of progress to stderr."""
    print(message, file=sys.stderr, flush=True)


# --- Training ---------------------------------------------------------------------------------------------------------


def new_model(seed: int) -> Qwen3ForCausalLM:
    """An untrained model in float32."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**CONFIG, "torch_dtype": "float32"}))
    model.set_attn_implementation("eager")  # compiled, it beats the fused kernel on a CPU, whose backward is slow
    return model


def loss_of(model: Qwen3ForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of int64 (rows, window + 1)."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, windows: torch.Tensor) -> float:
    """Mean loss over int64 (windows, window + 1), in nats per token."""
    return math.fsum(loss_of(model, windows[i : i + 1]).item() for i in range(len(windows))) / len(windows)


class Optimizers:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms.

    The model computes in bfloat16, which is too coarse to add small updates to: float32 masters take them, and the
    model gets their rounded copy after every step. What trains is therefore exactly what ships.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        named = list(model.named_parameters())
        self._masters = [param.detach().float().clone() for _, param in named]
        model.bfloat16()
        self._params = [param for _, param in named]
        is_matrix = ["layers." in name and param.ndim == 2 for name, param in named]
        matrices = [m for m, yes in zip(self._masters, is_matrix, strict=True) if yes]
        others = [m for m, yes in zip(self._masters, is_matrix, strict=True) if not yes]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.1), MUON_LR),
            (torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0), ADAM_LR),
        ]

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """Apply the accumulated gradients at `lr_scale` times the peak rates, and clear them."""
        for master, param in zip(self._masters, self._params, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
            param.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for optimizer, peak in self._optimizers:
            optimizer.param_groups[0]["lr"] = peak * lr_scale
            optimizer.step()
        for master, param in zip(self._masters, self._params, strict=True):
            param.copy_(master)


def train(
    model: Qwen3ForCausalLM, batches: Batches, seconds: float, compiled: bool, validate: Callable[[], float]
) -> int:
    """Train `model` in place, to bfloat16, for `seconds`; returns the number of steps taken.

    `validate` gives the held-out loss shown with the progress.
    """
    optimizers = Optimizers(model)
    # One graph per window length: shapes left dynamic are slower.
    loss_fn = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    started = time.monotonic()
    shown = validated = started
    step = shown_step = 0
    share = 0.0
    loss = torch.zeros(())
    for until, window in PHASES:
        stream = batches.of(window)
        log(f"windows of {window} tokens until {until * seconds / 60:.1f} min")
        while share < until:
            loss = torch.zeros(())
            for _ in range(TOKENS_PER_STEP // MICRO_BATCH_TOKENS):
                part = loss_fn(model, next(stream)) * (MICRO_BATCH_TOKENS / TOKENS_PER_STEP)
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
            optimizers.step(min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - share))
            step += 1
            now = time.monotonic()
            share = (now - started) / seconds
            if now - shown >= 10:
                rate = (step - shown_step) * TOKENS_PER_STEP / (now - shown)
                log(f"{min(share, 1):6.1%}  step {step:5d}  loss {loss.item():.3f}  {rate:6.0f} tokens/s")
                if now - validated >= 300:
                    log(f"        held-out loss {validate():.3f}")
                    validated = time.monotonic()
                shown, shown_step = time.monotonic(), step
    return step


# --- The checkpoint directory -----------------------------------------------------------------------------------------


def write_checkpoint(out: Path, model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    """Write weights, configuration and tokenizer into the existing directory `out`."""
    eos_token_ids = [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(IM_END)]
    config = {**CONFIG, "eos_token_id": eos_token_ids, "pad_token_id": eos_token_ids[0]}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"eos_token_id": eos_token_ids, "pad_token_id": eos_token_ids[0]})
    weights = {name: param.detach().contiguous() for name, param in model.named_parameters()}  # tied head: once
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_POSITIONS,
            "bos_token": None,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [IM_START],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def samples(checkpoint: Path, seed: int) -> list[tuple[str, str, str]]:
    """(heading, prompt, continuation) as transformers reads and runs the finished directory."""
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": CHAT}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    torch.manual_seed(seed)
    made: list[tuple[str, str, str]] = []
    for prompt in (*PROMPTS, chat):
        inputs = tokenizer(prompt, return_tensors="pt")
        for heading, how in (
            ("greedy", {"do_sample": False}),
            ("temperature 0.7", {"do_sample": True, "temperature": 0.7, "top_k": 0}),
        ):
            output = model.generate(**inputs, max_new_tokens=120, **how)
            made.append((heading, prompt, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])))
    return made


def model_card(run: Run, made: Sequence[tuple[str, str, str]], tokenizer: Tokenizer) -> str:
    """The directory's README.md."""
    examples = "\n".join(f"**{heading}**\n\n````text\n{prompt}{text}\n````\n" for heading, prompt, text in made)
    phases = ", then ".join(f"{window} up to {until:.0%} of the time" for until, window in PHASES)
    return f"""---
license: psf-2.0
language: [en]
tags: [code, python]
pipeline_tag: text-generation
---

# tiny_python

A {run.parameters / 1e6:.1f}-million-parameter Qwen3 language model (bfloat16) that writes text with the look of
Python's standard library. It ships with Baton so that a server can be tried with no download: it loads in a moment
and runs on a CPU. It is a toy, not an assistant.

## Training

- Text: sources, with their docstrings, of CPython {platform.python_version()}'s standard library, without its tests,
  tables of data, `lib2to3` and installed packages: {run.train_files} files, {run.train_tokens / 1e6:.2f} M tokens.
  About {CHAT_SHARE:.0%} of what it saw are ChatML exchanges made from the same files (a question naming a function or
  its docstring, answered with the source; or a question for a docstring), so `<|im_end|>` ends its turns.
- Tokenizer: byte-level BPE of {tokenizer.get_vocab_size()} tokens, trained on the same text.
- From random weights, {run.minutes:.0f} minutes of wall time (CPU threads: {torch.get_num_threads()}): {run.steps}
  steps of {TOKENS_PER_STEP} tokens, {run.tokens / 1e6:.1f} M in all, {run.epochs:.1f} epochs;
  windows of tokens: {phases}.
  Muon for the layers' matrices, AdamW for the rest, linear decay to zero.
- Held out: {run.held_out_files} files; loss {run.held_out_loss:.3f} nats per token,
  {run.held_out_bits_per_byte:.3f} bits per byte.

`python -m baton.checkpoints.train_tiny_python --out DIR` makes such a checkpoint anew.

## Limits

It knows one library's style and no facts: names, arguments and behaviour in what it writes are inventions. Answers are
not fit for use as code or as advice. It saw no more than {PHASES[-1][1]} tokens at once, and English only as docstrings
and comments. With greedy decoding it tends to repeat itself; temperature 0.7 is livelier.

## License

The training text is CPython's standard library, under the PSF License Agreement (some modules carry their own
permissive notices). A model this small can recite fragments of it; treat those as covered by that license.

## What it writes

Up to 120 tokens, not selected:

{examples}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m baton.checkpoints.train_tiny_python",
        description="Train a small Qwen3 on the standard library of the running Python and write it as a checkpoint.",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write; an earlier checkpoint is replaced")
    parser.add_argument("--minutes", type=float, default=40.0, help="wall time for the whole run (default 40)")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads (default 2); on a busy machine, 1 can be faster"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and samples (default 0)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the model: half as fast again for about a minute of compilation; needs a C++ compiler",
    )
    args = parser.parse_args(argv)
    if not (math.isfinite(args.minutes) and args.minutes > 0):
        parser.error("--minutes must be positive")
    try:
        with checkpoint_directory(args.out) as directory:
            loss = make_checkpoint(directory, args.minutes, args.threads, args.seed, args.compile)
    except KeyboardInterrupt:
        log(f"interrupted; nothing was written to {args.out}")
        return 130
    except (OSError, ValueError) as error:
        log(f"error: {error}")
        return 1
    size = sum(path.stat().st_size for path in args.out.iterdir())
    log(f"wrote {args.out}: {size / 1e6:.1f} MB, held-out loss {loss:.3f}")
    return 0


def make_checkpoint(out: Path, minutes: float, threads: int, seed: int, compiled: bool) -> float:
    """Train for `minutes` in all and write the result into the empty directory `out`; returns the held-out loss.

    Raises:
        OSError: the library cannot be read or `out` cannot be written.
        ValueError: too little text for the vocabulary.
    """
    started = time.monotonic()
    torch.set_num_threads(threads)
    corpus = load_corpus(Path(sysconfig.get_path("stdlib")), seed)
    log(f"{len(corpus.train)} files to train on, {len(corpus.held_out)} held out, {len(corpus.chats)} chats")
    tokenizer = train_tokenizer(corpus)
    documents = encode(tokenizer, corpus.train)
    batches = Batches(documents, encode(tokenizer, corpus.chats), seed)
    held_out = encode(tokenizer, corpus.held_out)
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    windows = to_windows(np.concatenate(held_out), PHASES[-1][1])[:EVAL_WINDOWS]
    log(f"{batches.epoch_tokens / 1e6:.2f} M tokens per epoch; read and encoded in {time.monotonic() - started:.0f} s")

    model = new_model(seed)
    reserve = min(45.0, 0.1 * minutes * 60)  # for evaluation, samples and writing
    seconds = minutes * 60 - reserve - (time.monotonic() - started)
    steps = train(model, batches, seconds, compiled, lambda: held_out_loss(model, windows[:8]))
    loss = held_out_loss(model, windows)
    run = Run(
        minutes=(time.monotonic() - started) / 60,
        steps=steps,
        tokens=steps * TOKENS_PER_STEP,
        epochs=steps * TOKENS_PER_STEP / batches.epoch_tokens,
        parameters=model.num_parameters(),
        train_files=len(corpus.train),
        train_tokens=sum(map(len, documents)),
        held_out_files=len(corpus.held_out),
        held_out_loss=loss,
        held_out_bits_per_byte=loss / math.log(2) * sum(map(len, held_out)) / held_out_bytes,
    )

    write_checkpoint(out, model, tokenizer)
    card = model_card(run, samples(out, seed), tokenizer)
    (out / "README.md").write_text(card, encoding="utf-8")
    return loss


if __name__ == "__main__":
    sys.exit(main())
