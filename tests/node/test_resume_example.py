"""The example for Node.js against real schedulers that are killed while it streams."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from baton import Client
from baton.checkpoints import TINY_PYTHON
from benchmarks.kill_test.cluster import KillableCluster, Settings
from tests.e2e.harness import eventually

from .conftest import EXAMPLE

PROMPT = "# größer 🙂\ndef fibonacci(n):"
TOKENS = 1200
SEED = 2**64 - 59  # no double
REQUEST = {"text": PROMPT, "stop": {"max_tokens": TOKENS, "ignore_eos": True}}
JOIN_SECONDS = 60.0


@pytest.fixture
def pair() -> Iterator[KillableCluster]:
    """Two schedulers with an executor each."""
    settings = Settings(model=TINY_PYTHON, schedulers=2, executors=2, num_blocks=400, max_rows=8)
    with KillableCluster(settings) as cluster:
        asyncio.run(cluster.start())
        assert eventually(lambda: all(map(has_executor, cluster.addresses)), JOIN_SECONDS)
        yield cluster


def has_executor(address: str) -> bool:
    with Client(address) as client:
        return bool(client.cluster_status().executors)


def example(addresses: list[str], request: dict[str, Any]) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_grpc_proxy": "127.0.0.1"}
    command = ["node", "resume.js", ",".join(addresses), json.dumps(request)]
    return subprocess.Popen(command, cwd=EXAMPLE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def beginning(process: "subprocess.Popen[bytes]") -> bytes:
    """What it has printed first; nothing is left in a buffer that ``communicate`` would not see."""
    assert process.stdout is not None
    return os.read(process.stdout.fileno(), 4096)


def ending(process: "subprocess.Popen[bytes]") -> tuple[bytes, str]:
    """The rest of its output, and what it said on stderr."""
    rest, words = process.communicate(timeout=120)
    return rest, words.decode()


def test_text_comes_exactly_once_though_a_scheduler_dies(pair: KillableCluster) -> None:
    first, second = pair.schedulers
    with Client(second.address) as client:
        expected = client.generate(PROMPT, seed=SEED, max_tokens=TOKENS, ignore_eos=True)
    process = example(pair.addresses, {**REQUEST, "sampling": {"seed": str(SEED)}})
    begun = beginning(process)
    first.kill()
    rest, words = ending(process)
    assert process.returncode == 0, words
    assert (begun + rest).decode() == expected.text
    assert words == f"\nFINISH_REASON_LENGTH, {TOKENS} tokens, continued 1 times\n"


def test_without_a_seed_of_its_own(pair: KillableCluster) -> None:
    """The first scheduler draws it; without it, the second would refuse to go on."""
    process = example(pair.addresses, REQUEST)
    begun = beginning(process)
    pair.schedulers[0].kill()
    rest, words = ending(process)
    assert process.returncode == 0, words
    assert words == f"\nFINISH_REASON_LENGTH, {TOKENS} tokens, continued 1 times\n"
    assert (begun + rest).decode()


def test_what_cannot_succeed_is_not_tried_again(pair: KillableCluster) -> None:
    process = example(pair.addresses, {**REQUEST, "sampling": {"temperature": -1}})
    out, words = ending(process)
    assert process.returncode and not out
    assert "INVALID_ARGUMENT: sampling.temperature" in words
