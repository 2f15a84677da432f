"""A small checkpoint, a fake engine, and a server between them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from baton_protos import generation_pb2_grpc
from scheduler_service.api.checkpoint import load_checkpoint
from scheduler_service.api.server import ApiServer
from scheduler_service.config import ProcessSpec, SchedulerSettings
from scheduler_service.listen import reserve_port

from .fake_engine import VOCAB_SIZE, FakeEngine

CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "the quick brown fox jumps over the lazy dog",
    "größer 日本語 🙂 👩‍👩‍👧 é",
]


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE like GPT-2's, with ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 50, trainer)
    return tokenizer


def write_checkpoint(folder: Path, **tokenizer_config: Any) -> Path:
    """A checkpoint directory without weights."""
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"architectures": ["TinyForCausalLM"], "vocab_size": VOCAB_SIZE, "eos_token_id": 0, "model_type": "qwen2"}
    texts = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [2, 0]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "chat_template": CHATML,
            **tokenizer_config,
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    fake = FakeEngine()
    fake.start()
    yield fake
    await fake.stop()


@dataclass
class Served:
    server: ApiServer
    channel: grpc.aio.Channel
    stub: generation_pb2_grpc.GenerationStub
    gateway_port: int  # 0 = none


Serve = Callable[..., Any]


@pytest.fixture
async def serve(engine: FakeEngine, checkpoint: Path) -> AsyncIterator[Serve]:
    """Start api servers in this process: ``await serve(index=..., model=..., any setting)``."""
    started: list[Served] = []

    async def start(index: int = 0, attached: bool = True, reuse_port: bool = False, **settings: Any) -> Served:
        values = {"model": checkpoint, "served_model_name": "tiny", "port": 0, "shutdown_grace": 0.2, **settings}
        spec = ProcessSpec(
            settings=SchedulerSettings(**values),
            scheduler_id="s",
            engine_endpoint=engine.endpoint,
            index=index,
            reuse_port=reuse_port,
        )
        server = ApiServer(spec, load_checkpoint(spec.settings.model))
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        served = Served(server, channel, generation_pb2_grpc.GenerationStub(channel), spec.settings.vllm_grpc_port)
        started.append(served)
        await until(lambda: not attached or server._engine.limits.max_total_tokens > 0)
        return served

    yield start
    for served in started:
        await served.channel.close()
        await served.server.stop()


@pytest.fixture
async def stub(serve: Serve) -> generation_pb2_grpc.GenerationStub:
    served: Served = await serve()
    return served.stub


def free_port() -> int:
    """A port that nobody listened on just now."""
    with reserve_port("127.0.0.1", 0, shared=False) as reservation:
        return reservation.port


async def until(condition: Callable[[], Any], timeout: float = 10.0) -> None:
    """Wait until ``condition()`` is true."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)
